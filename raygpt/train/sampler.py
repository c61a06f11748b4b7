"""Text that a run's checkpoints write, for the report; needs torch."""

from raygpt.data.tokenizer import load_tokenizer
from raygpt.errors import UserError
from raygpt.generate import sample_text
from raygpt.runs.files import SAMPLES
from raygpt.train import checkpoints, state
from raygpt.train.job import Job


class Sampler:
    """Lets checkpoints of a run continue its prompt, each once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._texts: dict[int, str] = {}

    def add(self, step: int) -> str:
        """The text of the checkpoint of a step, which is added to samples.txt; empty if there is
        no such checkpoint any more.

        Raises:
            UserError: it cannot be read; it is not tried again.
        """
        if step not in self._texts:
            self._texts[step] = ""
            self._texts[step] = self._sample(step)
        return self._texts[step]

    def _sample(self, step: int) -> str:
        train = self._job.config.train
        try:
            loaded = state.load_model(self._job.run.child(checkpoints.checkpoint_name(step)).uri)
        except UserError:
            if checkpoints.is_finished(self._job.run, step):
                raise
            return ""  # a newer one has taken its place
        tokenizer = load_tokenizer(loaded.tokenizer_name)
        (text,) = sample_text(
            loaded.model,
            tokenizer,
            train.sample_prompt,
            num_return_sequences=1,
            max_length=len(tokenizer.encode(train.sample_prompt)) + train.sample_tokens,
            seed=train.seed,
        )
        self._keep(step, text)
        return text

    def _keep(self, step: int, text: str) -> None:
        run = self._job.run
        try:
            earlier = run.read_bytes(SAMPLES)
        except FileNotFoundError:
            earlier = b""
        entry = f"--- step {step}\n{text}\n".encode()
        if entry not in earlier:
            run.write_bytes(SAMPLES, earlier + entry)
