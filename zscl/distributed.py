"""Deprecated: import these names from `zscl.extend`."""

import warnings

from zscl.extend import *  # noqa: F403

warnings.warn("zscl.distributed is deprecated; import its names from zscl.extend", DeprecationWarning, stacklevel=2)
