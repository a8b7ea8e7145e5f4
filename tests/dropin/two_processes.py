"""One of two processes that train one model; run by test_ecosystem.py."""

import sys

import torch
import torch.distributed
from torch import nn

import fused_lstm


def main(store: str, rank: int) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2
    )
    for backend in [None, "reference"]:
        options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
        torch.manual_seed(0)
        native = nn.LSTM(4, 5, **options)
        torch.manual_seed(rank)  # DistributedDataParallel starts from the weights of rank 0
        ours = nn.parallel.DistributedDataParallel(
            fused_lstm.LSTM(4, 5, **options, backend=backend)
        )
        x = torch.randn(6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            native.zero_grad()
            ours.zero_grad()
            native(x)[0].square().mean().backward()
            ours(x[:, 2 * rank : 2 * rank + 2])[0].square().mean().backward()
            for name, parameter in native.named_parameters():
                torch.testing.assert_close(getattr(ours.module, name).grad, parameter.grad)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
