"""Datasets of the Hugging Face hub, streamed, and written in GPT-2 tokens."""

import argparse
import fnmatch
import time

from common import GPT2_META, parse_arguments
from documents import FileReader, Reader, file_states, find_files, text_of
from tqdm import tqdm
from writing import Unfinished, is_prepared, write_documents

RETRIES = 5  # of a stream that breaks, on top of those of `datasets`
VAL_EVERY = 2000  # one document of so many is for validation
PARQUET = "refs/convert/parquet"  # the branch to which the hub converts datasets


class HubReader(Reader):
    """The documents of a streamed dataset: a datasets.IterableDataset. Reading raises OSError."""

    unit = " documents"

    def __init__(self, rows, total=None, limit=None):
        super().__init__(limit)
        self.rows, self.total = rows, limit or total
        self.position = {"rows": rows.state_dict()}

    def progress(self):
        return self.documents

    def read(self):
        failures = 0
        while True:
            self.rows.load_state_dict(self.position["rows"])
            try:
                for row in self.rows:
                    self.position = {"rows": self.rows.state_dict()}
                    number = self.documents + self.unreadable + 1
                    yield f"document {number}", text_of(row, "text"), True
                    failures = 0
                return
            except Exception as error:  # the hub's client raises many kinds
                failures += 1
                if failures > RETRIES:
                    raise OSError(f"the stream broke: {first_line(error)}") from None
                tqdm.write(f"the stream broke: {first_line(error)}; next try in {2**failures} s")
                time.sleep(2**failures)


def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def stream(hub_name, config_name, take_part):
    """The train split of a dataset on the hub, as a datasets.IterableDataset.

    Since version 4, `datasets` runs no dataset script. Where the hub has one we take what the hub
    made of it, if that is all of it, or if take_part. Raises OSError, or what `datasets` raises."""
    from datasets import load_dataset  # late: only here, and slow to import
    from huggingface_hub import HfApi

    try:
        return load_dataset(hub_name, config_name, split="train", streaming=True)
    except RuntimeError as error:
        if "Dataset scripts are no longer supported" not in str(error):
            raise
    names = HfApi().list_repo_files(hub_name, repo_type="dataset", revision=PARQUET)
    names = sorted(fnmatch.filter(names, f"{config_name or '*'}/*train/*"))  # or partial-train
    if not names:
        raise OSError(f"the hub has no parquet files of it at {PARQUET}")
    if "/partial-train/" in names[0] and not take_part:
        raise OSError(
            f"the hub has only the first part of it as parquet ({len(names)} files at {PARQUET}); "
            "--documents=N takes the first N documents of that"
        )
    return load_dataset(
        hub_name, data_files={"train": names}, revision=PARQUET, split="train", streaming=True
    )


def prepare_from_hub(folder, hub_name, config_name, num_documents, instead=""):
    """The main function of openwebtext and fineweb_edu: write a dataset of the hub in GPT-2 tokens.

    Streams the `text` column from the Hugging Face hub, or reads local files. instead: another
    command, for the message if the hub fails us."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", nargs="+", help="local files instead of the hub, as parquet")
    parser.add_argument("--documents", type=int, help="stop after this number of documents")
    args = parse_arguments(parser)
    source = " ".join(args.files) if args.files else f"hub:{hub_name}/{config_name or 'default'}"
    if args.documents:
        source += f", first {args.documents}"
    if is_prepared(folder, source):
        return
    settings = {"source": source}
    if args.files:
        files = find_files(args.files)
        settings["files"] = file_states(files)
        reader = FileReader(files, limit=args.documents)
    else:
        try:
            rows = stream(hub_name, config_name, take_part=args.documents)
        except Exception as error:  # the hub's client raises many kinds when it is out of reach
            raise OSError(
                f"could not read {source}: {first_line(error)}; --files reads your own copy of it"
                f"{instead and f', and {instead} prepares a similar dataset'}"
            ) from None
        reader = HubReader(rows, num_documents, args.documents)

    def divide(piece):
        return [("train" if piece.document % VAL_EVERY else "val", *piece[:2])]

    with Unfinished(folder, settings) as unfinished:
        write_documents(unfinished, GPT2_META, source, reader, divide, args.processes)
