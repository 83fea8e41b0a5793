"""Conversion of public datasets to task folders (`zscl data prepare`, `zscl data fetch`)."""
