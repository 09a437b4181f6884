"""Singular directions of an update from its two factors, and how much two sets of directions share.

Shapes: H input features, O output features, R lora_rank, I and J numbers of directions.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class UpdateDirections:
    """The singular value decomposition of an update dW = U diag(s) V^T, of rank R at most."""

    u_OR: torch.Tensor
    s_R: torch.Tensor
    v_HR: torch.Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of dW."""
        return float(self.s_R.norm())


def decompose_update(a_RH: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> UpdateDirections:
    """Of scaling B A, in fp64, without forming an O x H matrix: the two factors' QR leave an R x R core."""
    left_OR, left_core = torch.linalg.qr(b_OR.double())
    right_HR, right_core = torch.linalg.qr(a_RH.double().t())
    u, s_R, vt = torch.linalg.svd(scaling * left_core @ right_core.t())
    return UpdateDirections(left_OR @ u, s_R, right_HR @ vt.t())


def compute_input_directions(a_RH: torch.Tensor) -> torch.Tensor:
    """Right singular vectors of A [H, R], the strongest first, fp64: the directions that section 7.2 compares."""
    vt_RH: torch.Tensor = torch.linalg.svd(a_RH.double(), full_matrices=False).Vh
    return vt_RH.t()


def compute_similarity(first_HI: torch.Tensor, second_HJ: torch.Tensor) -> torch.Tensor:
    """The paper's phi [I, J] (eq. 4): ||U_i^T V_j||_F^2 / min(i, j) of the first i and first j directions.

    1 where the smaller span lies in the larger one, 0 where they are orthogonal; max(i, j) / H by chance alone.
    """
    shared_IJ = (first_HI.t() @ second_HJ).square().cumsum(0).cumsum(1)
    i_I1 = torch.arange(1, shared_IJ.shape[0] + 1).unsqueeze(1)
    j_J = torch.arange(1, shared_IJ.shape[1] + 1)
    return shared_IJ / torch.minimum(i_I1, j_J)
