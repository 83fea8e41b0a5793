"""How it learns: the method, on torch, open_clip and webdataset alone."""
