"""MaskCLIP+'s students: a dilated ResNet, a segmentation head, and the text embeddings as classifier (paper §3.3)."""

from maskclip_jax.students.model import Student, StudentConfig, create_student
from maskclip_jax.students.resnet import VARIANTS, Stages, Variant

__all__ = ["VARIANTS", "Stages", "Student", "StudentConfig", "Variant", "create_student"]
