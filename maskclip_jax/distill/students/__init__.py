"""MaskCLIP+'s students: a dilated ResNet, a segmentation head, and the text embeddings as classifier (paper §3.3)."""

from maskclip_jax.distill.students.resnet import VARIANTS, Stages, Variant, variant
from maskclip_jax.distill.students.student import Student, StudentConfig, create_student

__all__ = ["VARIANTS", "Stages", "Student", "StudentConfig", "Variant", "create_student", "variant"]
