"""python docs/own_loop/transformers_trainer.py

Hugging Face's Trainer: one callback. The 64 pixels of a digit are 64 tokens of a tiny BERT. Interrupt it and run it
again: it goes on from the last checkpoint, to the same bits.
"""

import torch
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tritprune.integrations import TransformersPruning


def make_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=17, num_labels=10, **sizes))


def make_data():
    images, labels = load_digits(return_X_y=True)
    return [{"input_ids": torch.tensor(x).long(), "labels": int(y)} for x, y in zip(images, labels, strict=True)]


def make_trainer(folder, **changes):
    settings = {"max_steps": 60, "save_steps": 20, "logging_steps": 10, "learning_rate": 3e-3}
    args = TrainingArguments(folder, report_to="none", use_cpu=True, **{**settings, **changes})
    data = make_data()
    trainer = Trainer(make_model(), args, train_dataset=data[:-300], eval_dataset=data[-300:])
    pruning = TransformersPruning(pattern="4x1", target_sparsity=0.8, start_step=0.1, end_step=0.7, frequency=3)
    return trainer, pruning.add_to(trainer)


if __name__ == "__main__":
    trainer, pruning = make_trainer("outputs/transformers_trainer")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))
    print(f"sparsity {pruning.pruner.sparsity().prunable.sparsity:.4f}, masks {pruning.pruner.digest()[:12]}")
