"""A local web page on which trained models can be tried."""
