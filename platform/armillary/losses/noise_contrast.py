"""Noise-contrastive estimation: a density learned by telling data from noise."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from armillary.losses.tensors import float32_math


class NCE(nn.Module):
    """Data against noise of known density. Gutmann and Hyvärinen, JMLR 13, 2012, eq. 8.

    With ``G(u) = log p_m(u) - log p_n(u)`` and nu noise samples for each sample of the data::

        L = - mean_t log sigmoid(G(x_t) - log nu)  -  nu mean_s log sigmoid(log nu - G(y_s))

    The model need not be normalised: its log-partition is a parameter like the others. The paper of 2010 has nu = 1 and
    half of this loss. The survey forgets the factor nu before the second mean, without which the minimum is another
    density; there is nothing to select.
    """

    @float32_math
    def forward(
        self, model_of_data: Tensor, noise_of_data: Tensor, model_of_noise: Tensor, noise_of_noise: Tensor
    ) -> Tensor:
        """The mean over this worker's data.

        Args:
            model_of_data: log p_m of the data, ``(batch,)``.
            noise_of_data: log p_n of the data, ``(batch,)`` or a scalar.
            model_of_noise: log p_m of the noise, ``(batch, nu)`` or ``(nu * batch,)``.
            noise_of_noise: log p_n of the noise, of that shape or a scalar.
        """
        nu = model_of_noise.numel() / model_of_data.numel()
        data = F.logsigmoid(model_of_data - noise_of_data - math.log(nu))
        noise = F.logsigmoid(math.log(nu) - (model_of_noise - noise_of_noise))
        return -data.mean() - nu * noise.mean()
