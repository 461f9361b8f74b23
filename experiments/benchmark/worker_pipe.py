"""A worker process that works on demand. Needs nothing but Python, for it also runs where only PyTorch is.

Lines of JSON: the worker says when it is ready; each line it reads asks for something and is answered by one line. One
process a case makes peaks of memory honest, and lets the parent take turns between rivals, so that whatever else the
machine does meets them alike.
"""

import json
import os
import resource
import sys
import time


def read_spec():
    """What to do, from the command line; keeps this process to so many cores before any library counts them.

    Whatever is printed from now on goes to stderr: stdout is the parent's.
    """
    spec = json.loads(sys.argv[1])
    if spec["threads"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return spec, out


def serve(out, run, facts, rate=float, gather=dict):
    """Answers until the parent goes away: "run" does the work once, "rate" measures the machine, "end" says the rest.

    run: the work, to its end.   facts: said when ready.   rate: operations a second of a matrix product, now.
    gather: facts known only at the end.
    """
    before = resident_mib()
    began = time.perf_counter()
    run()  # compiles what there is to compile
    print(json.dumps(facts | {"first_seconds": time.perf_counter() - began}), file=out)
    for line in sys.stdin:
        asked = line.strip()
        began, cpu = time.perf_counter(), cpu_seconds()
        if asked == "run":
            run()
            answer = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu}
        elif asked == "rate":
            answer = {"rate": rate()}
        else:
            answer = {"peak_mib": peak_mib(), "loaded_mib": before} | gather()
        print(json.dumps(answer), file=out)


def cpu_seconds():
    """CPU time of this process and of those that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_mib(who=resource.RUSAGE_SELF):
    """The most memory this process, or one that it has waited for (RUSAGE_CHILDREN), ever held (resident), in MiB."""
    peak = resource.getrusage(who).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def resident_mib():
    """Memory this process holds now, in MiB; where the system does not tell, its peak so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return peak_mib()
