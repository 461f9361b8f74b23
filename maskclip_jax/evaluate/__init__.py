"""Scores of segmentation: metrics, and the engine that walks a data set."""

from maskclip_jax.evaluate.metrics import confusion_matrix as confusion_matrix
from maskclip_jax.evaluate.metrics import mean_iou as mean_iou
from maskclip_jax.evaluate.metrics import seen_unseen_harmonic as seen_unseen_harmonic
