"""The frozen image and text encoders as linen modules, and the dense-value head."""
