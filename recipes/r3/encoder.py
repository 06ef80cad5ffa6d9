"""A small sentence encoder for recipes on a CPU: it stands for `facebook/contriever`, without a download.

    python recipes/r3/encoder.py        # writes runs/encoder, 70 CPU seconds

The bundled policy, mean-pooled, becomes the encoder, by the contrastive loss that Contriever was trained with
(https://huggingface.co/papers/2112.09118); pairs are by rule. Near one another come a question and a reply to it, a
reference sentence and a reply that says the same, and a question with one right reply and with another. Far from them
are those of other questions, and a reply that says something else or nothing. Questions are like those of the bundled
data, none of which is among them.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from trl_rewards.bundled import model_path, quiz, teach

QUESTIONS = 24
"""Of a batch."""
SHARPNESS = 20.0
"""By which cosines are multiplied, 1 / temperature."""


def right(rng: random.Random, question: quiz.Question) -> str:
    return quiz.REPLIES[rng.choice(["clean", "clean", "bare"])](rng, question)


def wrong(rng: random.Random, question: quiz.Question) -> str:
    return quiz.REPLIES[rng.choice(["guess", "slip"])](rng, question)


def triple(rng: random.Random, question: quiz.Question) -> tuple[str, str, str]:
    """A text, one that is near it and one that is not."""
    kind = rng.choice(["topic", "reference", "both"])
    if kind == "topic":
        return question.text, right(rng, question), quiz.unhelpful(rng, question)
    if kind == "reference":
        sentence = rng.choice(question.sentences).replace("{}", question.said)
        return sentence, right(rng, question), wrong(rng, question)
    asked = f"{question.text}\n"
    return asked + right(rng, question), asked + right(rng, question), asked + wrong(rng, question)


def train(folder: Path, steps: int, rng: random.Random) -> list[float]:
    """Save an encoder, and say its losses."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(), padding_side="right")
    model = AutoModel.from_pretrained(model_path(), dtype=torch.float32)

    def vectors(texts: list[str]) -> torch.Tensor:
        """(n, H) means over tokens, those of padding left out."""
        given = tokenizer(texts, return_tensors="pt", padding=True)
        hidden = model(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    taken = quiz.known_questions()
    with torch.no_grad():  # so that vectors are of length 1 to begin with, and dot products about cosines
        sentences = [question.sentences[0] for question in quiz.more_questions(rng, QUESTIONS, taken)]
        model.norm.weight /= vectors(sentences).norm(dim=1).mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        triples = [triple(rng, question) for question in quiz.more_questions(rng, QUESTIONS, taken)]
        texts = [text for column in zip(*triples, strict=True) for text in column]
        found = vectors(texts)
        anchors, near, far = functional.normalize(found, dim=1).chunk(3)
        logits = SHARPNESS * anchors @ torch.cat([near, far]).T
        loss = functional.cross_entropy(logits, torch.arange(QUESTIONS))
        # R³ takes dot products: vectors stay of length 1, or long vectors would be relevant to everything.
        length = (found.square().sum(dim=1) - 1).square().mean()
        (loss + length).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/encoder", steps=150)
    losses = train(given.out, given.steps, rng)
    print(f"loss {statistics.fmean(losses[:5]):.2f} -> {statistics.fmean(losses[-5:]):.2f} -> {given.out}")


if __name__ == "__main__":
    main()
