"""muse-tokenize plan: writes the list of input shards once, for all tasks of an array to share.

    muse-tokenize plan config=configs/tokenize/imagenet_f16.yaml store.path=store/ …
    muse-tokenize plan config=store/work/config.yaml --only-missing
    muse-tokenize plan config=store/work/config.yaml --only-failed

Takes the options of encode, and loads the tokenizers to check them. Writes the plan and the
configuration into STORE/work; `muse-tokenize` on that store then reads its input shards from the
newest plan, so that a thousand tasks do not list a bucket each. A plan of what is missing, or has
failed, spreads that over all tasks evenly. How many tasks share a plan is free.
"""

import sys
from pathlib import Path

from configs.load import load_command_config
from storage.writer import expect_shards
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.encode import chosen, write_config
from tokenize_stage.pipeline.tokenizers import load_tokenizers
from tokenize_stage.process import refuse
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.work.plan import write_plan
from tokenize_stage.work.remaining import remaining_shards


def main(argv: list[str] | None = None) -> int:
    """Writes a plan; returns the exit status: 0, or 2 for what cannot be encoded."""
    config = load_command_config(TokenizeConfig, argv, __doc__ or "")
    store = Path(config.store.path)
    try:
        shards = list_input_shards(config.dataset)
        tokenizers = load_tokenizers(config.model, config.dataset.preprocessing.resolution)
        todo = chosen(store, remaining_shards(store, shards), config.only)
        store.mkdir(parents=True, exist_ok=True)
        write_config(store, config)
        expect_shards(store, [shard.name for shard in shards])
        path = write_plan(store, shards if config.only == "all" else todo)
    except (ValueError, OSError) as error:
        return refuse(error)
    models = ", ".join(f"{column} by {one.recorded.name}" for column, one in tokenizers.items())
    print(f"{models}; {len(shards):,} input shards, {len(todo):,} of them to encode")
    print(f"plan {path}")
    if todo:
        command = f"muse-tokenize config={store}/work/config.yaml"
        print(
            f"next: {command}, or as an array: slurm/tokenize_array.sh with up to {len(todo)} tasks"
        )
    else:
        print(f"next: muse-tokenize status {store}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
