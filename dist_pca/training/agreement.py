"""What rank 0 alone finds out, and all ranks must end by."""

import torch.distributed as dist

from dist_pca.errors import UserError


def refuse_together(message: str | None) -> None:
    """Raise rank 0's message on all ranks, where it has one. Collective; other ranks' are not looked at.

    Raises:
        UserError: there is a message.
    """
    told = [message]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise UserError(told[0])
