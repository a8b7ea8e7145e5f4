"""The character-level language model, in which either LSTM layer can be put.

Dimensions: `T` time steps, `B` streams, `V` characters of the alphabet, `E` embedding features,
`H` hidden units, `L` layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]
"""`(h, c)`, each [L, B, H]: what an LSTM carries from one call to the next."""


class CharacterModel(nn.Module):
    """Embedding, LSTM, linear read-out: predicts the next character.

    Dropout surrounds the LSTM and takes its masks as arguments, so that two models can be given
    the same ones whatever random numbers their layers would draw.

    Args:
        lstm: the class of the recurrent layer, `torch.nn.LSTM` or a drop-in for it.
        characters: `V`, the size of the alphabet.
        embedding_size: `E`.
        hidden_size: `H`.
        layers: `L`.
    """

    def __init__(
        self,
        lstm: type[nn.LSTM],
        *,
        characters: int,
        embedding_size: int,
        hidden_size: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding_size)
        self.lstm = lstm(embedding_size, hidden_size, num_layers=layers)
        self.readout = nn.Linear(hidden_size, characters)

    def forward(
        self,
        characters: Tensor,
        state: State | None = None,
        *,
        embedding_mask: Tensor | None = None,
        hidden_mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Predict the character that follows each one.

        Args:
            characters: [T, B] int64, the characters read.
            state: the state carried from the characters before, or `None` at the beginning.
            embedding_mask: [T, B, E], multiplies the LSTM's input (dropout).
            hidden_mask: [T, B, H], multiplies the LSTM's output (dropout).

        Returns:
            [T, B, V] logits of the characters that follow, and the state after the last step.
        """
        features = self.embedding(characters)
        if embedding_mask is not None:
            features = features * embedding_mask
        hidden, state = cast("tuple[Tensor, State]", self.lstm(features, state))
        if hidden_mask is not None:
            hidden = hidden * hidden_mask
        return self.readout(hidden), state


@torch.no_grad()
def stream_characters(
    model: CharacterModel, prompt: Tensor, *, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    """Write text one character at a time, for as long as it is asked.

    Each call of the model reads one time step of one stream (T = 1, B = 1) and carries the state
    on, which is how an LSTM runs in a keyboard or a microphone.

    Args:
        model: a trained model.
        prompt: [N] int64, N ≥ 1, the characters to go on from, on the model's device.
        temperature: divides the logits; below 1 the likely characters become likelier.
        generator: a CPU generator that draws the characters.

    Yields:
        The index of the next character.

    Raises:
        ValueError: the prompt is empty, or the temperature is not above 0.
    """
    if not len(prompt):
        raise ValueError("prompt is empty; expected at least one character to go on from")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; expected a number above 0")
    logits, state = model(prompt[:, None])
    while True:
        # Drawn on the CPU: the same seed then writes the same text on every device.
        probabilities = torch.softmax(logits[-1, 0].float().cpu() / temperature, dim=0)
        character = int(torch.multinomial(probabilities, 1, generator=generator))
        yield character
        logits, state = model(prompt.new_tensor([[character]]), state)
