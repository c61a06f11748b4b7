"""raygpt: pretrain GPT-2 / GPT-3 style language models as a Ray Train job."""

__version__ = "0.1.0"
