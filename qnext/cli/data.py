"""`qnext data`: prepare shards, train a vocabulary, look at what shards hold. Needs no torch."""

import argparse
import sys

DEFAULT_OUTPUT_HELP = "folder to write"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command with its three subcommands."""
    parser = subparsers.add_parser(
        "data", help="turn texts into deduplicated, tokenised, memory-mapped shards"
    )
    commands = parser.add_subparsers(dest="data_command", metavar="WHAT", required=True)

    prepare = commands.add_parser("prepare", help="corpora to token shards with a manifest")
    prepare.add_argument("config", nargs="?", help="TOML file with [[source]] tables")
    prepare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    prepare.add_argument("--input", action="append", default=[], metavar="FILE", dest="inputs")
    prepare.add_argument("--name", default="text", help="name of the source made of --input")
    prepare.add_argument("--chat", action="store_true", help="--input holds lists of messages")
    prepare.add_argument("--text-key", default="text", help="key of the text in a record")
    prepare.add_argument("--license", default="unknown", help="licence of records without one")
    prepare.add_argument("--language", default="unknown", help="language of records without one")
    prepare.add_argument("--tokenizer", help="tokenizer folder")
    prepare.add_argument("--near-dedup", action="store_true", help="drop near duplicates too")
    prepare.add_argument("--output", help=DEFAULT_OUTPUT_HELP)

    tokenizer = commands.add_parser("tokenizer", help="train a byte-level BPE vocabulary")
    tokenizer.add_argument("config", nargs="?", help="TOML file with [[source]] samples")
    tokenizer.add_argument("--vocab-size", type=int, help="entries in all")
    tokenizer.add_argument("--input", action="append", default=[], metavar="FILE", dest="inputs")
    tokenizer.add_argument("--text-key", default="text", help="key of the text in a record")
    tokenizer.add_argument(
        "--max-bytes", type=int, metavar="N", help="read at most N bytes of each file"
    )
    tokenizer.add_argument("--chat-template", metavar="FILE", help="Jinja file to put beside it")
    tokenizer.add_argument("--output", help=DEFAULT_OUTPUT_HELP)

    inspect = commands.add_parser("inspect", help="show the manifest of prepared shards")
    inspect.add_argument("folder")
    inspect.add_argument("--verify", action="store_true", help="compare every file with its hash")
    inspect.add_argument("--json", action="store_true", help="print the manifest itself")


def run(args: argparse.Namespace) -> int:
    """Run one subcommand.

    Raises:
        ValueError: options that contradict each other, or input that cannot be read.
    """
    commands = {"prepare": _prepare, "tokenizer": _tokenizer, "inspect": _inspect}
    return commands[args.data_command](args)


def _prepare(args: argparse.Namespace) -> int:
    from qnext.config.toml import load_toml
    from qnext.data.prepare import PrepareConfig, SourceConfig, prepare

    if bool(args.config) == bool(args.inputs):
        raise ValueError("give either a CONFIG.toml or --input, --tokenizer and --output")
    if args.config:
        settings = [
            f"{name}={value}"
            for name, value in (("tokenizer", args.tokenizer), ("output", args.output))
            if value
        ]
        if args.near_dedup:
            settings.append("near_dedup=true")
        config = load_toml(args.config, PrepareConfig, [*settings, *args.settings])
    else:
        for name in ("tokenizer", "output"):
            if not getattr(args, name):
                raise ValueError(f"--{name} is missing: --input needs it")
        source = SourceConfig(
            name=args.name,
            inputs=tuple(args.inputs),
            kind="chat" if args.chat else "text",
            text_key=args.text_key,
            license=args.license,
            language=args.language,
        )
        config = PrepareConfig(
            tokenizer=args.tokenizer,
            output=args.output,
            source=(source,),
            near_dedup=args.near_dedup,
        )
    folder = prepare(config, lambda line: print(line, flush=True))
    print(f"wrote {folder}")
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from qnext.config.toml import load_toml
    from qnext.data.vocabulary import SampleConfig, VocabularyConfig, train_vocabulary

    if bool(args.config) == bool(args.inputs):
        raise ValueError("give either a CONFIG.toml or --input, --vocab-size and --output")
    if args.config:
        given = {"vocab_size": args.vocab_size, "output": args.output}
        given["chat_template"] = args.chat_template
        settings = [f"{name}={value}" for name, value in given.items() if value is not None]
        config = load_toml(args.config, VocabularyConfig, settings)
    else:
        for name in ("vocab_size", "output"):
            if getattr(args, name) is None:
                raise ValueError(f"--{name.replace('_', '-')} is missing: --input needs it")
        sample = SampleConfig(tuple(args.inputs), text_key=args.text_key, max_bytes=args.max_bytes)
        config = VocabularyConfig(args.vocab_size, args.output, (sample,), args.chat_template)
    folder = train_vocabulary(config, show_progress=sys.stderr.isatty())
    print(f"wrote {folder}: {config.vocab_size:,} entries")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    import json

    from qnext.data.shards import open_shards

    shards = open_shards(args.folder)
    if args.verify:
        shards.verify()
    if args.json:
        print(json.dumps(shards.manifest, ensure_ascii=False, indent=2))
        return 0
    print(f"{'source':<16}{'kind':<6}{'documents':>12}{'tokens':>16}{'in loss':>16}{'B/token':>9}")
    for source in shards.manifest["sources"]:
        per_token = source["bytes"] / source["tokens"]
        print(
            f"{source['name']:<16}{source['kind']:<6}{source['documents']:>12,}"
            f"{source['tokens']:>16,}{source['loss_tokens']:>16,}{per_token:>9.2f}"
        )
        for title in ("licenses", "languages"):
            shown = sorted(source[title].items(), key=lambda item: -item[1])[:5]
            print(f"  {title}: " + ", ".join(f"{name} {count:,}" for name, count in shown))
    total = sum(source["tokens"] for source in shards.manifest["sources"])
    print(f"{total:,} tokens, vocabulary {shards.vocab_size:,}")
    for view in shards.views.values():
        limit = f"{view.max_document_tokens:,}" if view.max_document_tokens else "any"
        print(
            f"view {view.name}: documents of {view.min_document_tokens:,} to {limit} tokens of "
            + ", ".join(view.sources)
        )
    if args.verify:
        print("every file has the hash in the manifest")
    return 0
