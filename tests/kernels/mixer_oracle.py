"""The mixer written out position by position, for tests: differentiable, in whatever precision its inputs have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mixer(zxbcdt, conv_state, state, weight, bias, dt_bias, A, D, norm_weight, *, g, eps=1e-6, norm_before_gate=True,
          activation=True, dt_limit=(0.0, float("inf")), seq_idx=None):  # fmt: skip
    """zxbcdt (b, l, columns) from conv_state (b, channels, w - 1) and state (b, h, p, n).

    Returns y (b, l, extra + dim), and both states after the last position. With seq_idx (b, l) both begin at zero
    wherever the index changes, the given ones belong to index 0, a negative index gives output 0 and a zero state.
    """
    b, l, columns = zxbcdt.shape
    _, h, p, n = state.shape
    dim, channels = h * p, weight.shape[0]
    extra = (columns - dim - channels - h) // 2
    outputs = []
    for i in range(b):
        window, S, rows = conv_state[i], state[i], []
        for t in range(l):
            index = 0 if seq_idx is None else int(seq_idx[i, t])
            previous = 0 if seq_idx is None or t == 0 else int(seq_idx[i, t - 1])
            if index != previous or index < 0:
                window, S = torch.zeros_like(window), torch.zeros_like(S)
            parts = zxbcdt[i, t].split([extra, extra, dim, channels, h])
            window = torch.cat([window, parts[3][:, None]], 1)
            y, S = _position(parts, window, S, weight, bias, dt_bias, A, D, norm_weight, g=g, eps=eps,
                             norm_before_gate=norm_before_gate, activation=activation, dt_limit=dt_limit)  # fmt: skip
            if index < 0:
                y, S = torch.cat([y[:extra], 0 * y[extra:]]), 0 * S
            window = window[:, 1:]
            rows.append(y)
        outputs.append((torch.stack(rows), window, S))
    return tuple(torch.stack(part) for part in zip(*outputs, strict=True))


def _position(parts, window, S, weight, bias, dt_bias, A, D, norm_weight, *, g, eps, norm_before_gate, activation,
              dt_limit) -> tuple[Tensor, Tensor]:  # fmt: skip
    z0, x0, z, _, dt = parts
    h, p, n = S.shape
    mixed = (window * weight).sum(1)
    if bias is not None:
        mixed = mixed + bias
    if activation:
        mixed = mixed * torch.sigmoid(mixed)
    x, B, C = mixed[: h * p].view(h, p), mixed[h * p :][: g * n].view(g, n), mixed[h * p + g * n :].view(g, n)
    heads, states = [], []
    for j in range(h):
        step = F.softplus(dt[j] + (0 if dt_bias is None else dt_bias[j])).clamp(*dt_limit)
        own = torch.exp(step * A[j]) * S[j] + step * torch.outer(x[j], B[j // (h // g)])
        y = own @ C[j // (h // g)]
        heads.append(y if D is None else y + D[j] * x[j])
        states.append(own)
    y, gate = torch.cat(heads), z * torch.sigmoid(z)
    if norm_weight is None:
        y = y * gate
    else:
        u = (y if norm_before_gate else y * gate).view(g, -1)
        u = (u / (u.square().mean(1, keepdim=True) + eps).sqrt()).flatten() * norm_weight
        y = u * gate if norm_before_gate else u
    return torch.cat([z0 * torch.sigmoid(z0) * x0, y]), torch.stack(states)
