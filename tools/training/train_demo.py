"""Train the bundled demo model on generated text, or measure a trained one."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from tools.training.demo_training import (
    Recipe,
    build_model,
    end_of,
    perplexity,
    save,
    train,
    train_tokenizer,
)

HELD_OUT_TEXTS = 500


def load(folder: Path) -> tuple[GPT2LMHeadModel, Tokenizer]:
    """The saved model in single precision, as the server runs it on a CPU."""
    model = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def measure(folder: Path, *, texts: int) -> dict[str, float]:
    model, tokenizer = load(folder)
    value = perplexity(model, tokenizer, texts=texts)
    return {"held_out_documents": texts, "held_out_perplexity": round(value, 3)}


def make(out: Path, recipe: Recipe, *, minutes: float, steps: int | None) -> None:
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, end=end_of(tokenizer))
    weights = sum(weight.numel() for weight in model.parameters())
    print(json.dumps({"weights": weights} | asdict(recipe)), flush=True)

    def keep() -> None:
        save(model, tokenizer, out, recipe)

    facts = train(model, tokenizer, recipe, seconds=minutes * 60, steps=steps, keep=keep)
    keep()
    print(json.dumps(facts | measure(out, texts=HELD_OUT_TEXTS)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("baton/models/demo"),
    help="Folder of the trained model; an old one is replaced at the end.",
)
@click.option("--minutes", type=float, default=25.0, help="Training time.")
@click.option("--steps", type=int, default=None, help="Train this many steps instead.")
@click.option("--seed", type=int, default=0, help="Seed of the corpus and of the weights.")
@click.option("--threads", type=int, default=1, help="CPU threads.")
@click.option(
    "--evaluate",
    type=click.Path(path_type=Path, exists=True),
    default=None,
    help="Only print the held-out perplexity of the model in this folder.",
)
@click.option("--texts", type=int, default=HELD_OUT_TEXTS, help="Held-out documents to read.")
def main(
    out: Path,
    minutes: float,
    steps: int | None,
    seed: int,
    threads: int,
    evaluate: Path | None,
    texts: int,
) -> None:
    """Write the corpus, train the demo model on it and save it; the last line is JSON."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if evaluate is not None:
        print(json.dumps(measure(evaluate, texts=texts)))
        return
    make(out, replace(Recipe(), seed=seed), minutes=minutes, steps=steps)


if __name__ == "__main__":
    main()
