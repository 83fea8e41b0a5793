"""How it learns: the method, on torch, open_clip and webdataset alone."""

import os

# WebDataset reads this once, when it is imported: no shell pipes for shards, no unpickling decoders.
os.environ.setdefault("WDS_SECURE", "1")
