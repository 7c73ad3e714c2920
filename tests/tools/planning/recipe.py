"""Overrides of the demo's run, so that tests do not depend on the recipe that it ships with."""

PLAIN = (
    *("objective.self_training.weight=0", "objective.smoothness.weight=0.01", "training.ema_decay=0"),
    *(f"objective.association.{switch}=false" for switch in ("teacher_check", "teacher_weight", "teacher_matches")),
    *("objective.association.class_balanced=false", "objective.association.label_share=0"),
    *("data.photometric.probability=0", "data.photometric.blur_probability=0"),
    *("model.running_statistics=all", "model.joint_batch=true", "model.association_stride=null"),
)
"""Source and target as one batch, the terms of the paper, no teacher."""
TEACHER = ("training.ema_decay=0.9", "objective.self_training.start_step=0", "objective.masked_consistency.weight=1")
"""With a third view, and a teacher for it."""
