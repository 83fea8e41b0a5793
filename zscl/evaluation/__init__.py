"""Zero-shot accuracy and the metrics of continual learning."""
