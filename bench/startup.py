"""`python -m bench.startup`: how long servers take until they answer, stock DP and TP against flying."""

from __future__ import annotations

import argparse
from statistics import median

from bench.models import add_model_options, model_of
from bench.plots import plot_bars
from bench.progress import progress
from bench.report import markdown, write
from bench.server import STOCK, add_server_options, bench_server, server_flags

SERVERS = {f"stock {layout}=2": options for layout, options in STOCK.items()} | {"flying, 2 engines": {"flying": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    add_model_options(parser)
    add_server_options(parser)
    arguments = parser.parse_args()
    model = model_of(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in SERVERS}
    with progress(arguments.turns * len(SERVERS)) as done:
        for turn in range(arguments.turns):
            for name, options in SERVERS.items():
                with bench_server(model, *server_flags(arguments), **options) as server:
                    seconds[name].append(server.start_seconds)
                done(f"turn {turn + 1} of {arguments.turns}, {name}: {seconds[name][-1]:.1f} s")
    stock = median(seconds["stock DP=2"])
    rows = [
        [name, f"{median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}", f"{median(values) / stock:.2f}"]
        for name, values in seconds.items()
    ]
    table = markdown(["server", "median s", "from, to", "ratio to stock DP"], rows)
    folder = write("startup", {"seconds": seconds}, table)
    plot_bars(folder / "startup.png", "Until the server answers", "s", {name: {"": values} for name, values in seconds.items()})


if __name__ == "__main__":
    main()
