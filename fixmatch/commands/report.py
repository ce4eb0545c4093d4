"""fixmatch report: the page of one run, or of several side by side."""

import pathlib

from fixmatch.cli import Parser


def main(argv: list[str]) -> int:
    parser = Parser("report", description="Make the page of a run, or of several side by side: seeds of one "
                                          "configuration as mean and deviation, supervised runs as the line to beat.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=pathlib.Path, help="a run folder")
    parser.add_argument("-o", dest="out", metavar="FILE", type=pathlib.Path,
                        help="the page; default: report.html in the run's folder, or in the one that holds all runs")
    args = parser.parse_args(argv)
    from fixmatch.report.page import write_report

    print(write_report(args.runs, args.out))
    return 0
