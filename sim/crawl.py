"""Crawl: hosts, pages and pauses → seconds.

A postman with many streets: at each door he rings, waits, takes what he is given, and lets the street rest before the next door. How
soon he is through depends on the longest street, on how many doors he can stand at, or on how much he can carry, whichever is worst.
"""

from typing import NamedTuple
from urllib.parse import urlsplit

import simpy

from conf.corpus import SHARD
from conf.plan import Crawl, Data, Plan
from sim.cluster import Course, World, per_second

MANY = 20_000  # pages that are simulated one by one


class Streets(NamedTuple):
    """Pages that each host is expected to give."""

    pages: tuple[int, ...]
    bytes: float  # of them all


def streets(plan: Crawl) -> Streets:
    """The pages of the plan, dealt to the hosts in turn, since a crawl goes on at all of them at once.

    >>> from conf.program import load
    >>> plan = load(["crawl.seeds=[http://a.example/,http://b.example/]", "crawl.pages=7", "crawl.page_bytes=10 kB"])
    >>> streets(plan.crawl)
    Streets(pages=(4, 3), bytes=70000.0)
    """
    hosts = plan.expected_hosts or len({urlsplit(seed.lower()).netloc for seed in plan.seeds})
    most = min(plan.pages_per_host, plan.expected_pages or plan.pages_per_host)
    whole, rest = divmod(min(plan.pages, hosts * most), hosts)
    pages = tuple(whole + (number < rest) for number in range(hosts))
    return Streets(tuple(count for count in pages if count), sum(pages) * plan.page_bytes)


def crawl(world: World) -> Course[dict[str, float]]:
    """Ask every host for its robots.txt and then for its pages, with pauses; all share the way to the web.

    Beyond MANY pages a step stands for several of a host's; the sums are the same.
    """
    began, plan = world.now, world.plan.crawl
    found = streets(plan)
    slots, way = simpy.Resource(world.env, plan.hosts_at_once), simpy.Resource(world.env)
    stride = -(-sum(found.pages) // MANY)

    def ask(pages: int, sent: float) -> Course[None]:
        with slots.request() as slot:
            yield slot
            yield world.env.timeout(pages * plan.latency)
            with way.request() as turn:
                yield turn
                yield world.env.timeout(sent / plan.bandwidth)

    def host(pages: int) -> Course[None]:
        yield from ask(1, 0.0)
        for first in range(0, pages, stride):
            count = min(stride, pages - first)
            yield world.env.timeout(count * plan.host_delay)
            yield from ask(count, count * plan.page_bytes)

    yield world.env.all_of([world.env.process(host(pages)) for pages in found.pages])
    seconds, pages = world.now - began, float(sum(found.pages))
    return {"seconds": seconds, "pages": pages, "bytes": found.bytes, "pages_per_s": per_second(pages, seconds)}


def corpus_of(plan: Plan) -> Data:
    """What there is to extract: the corpus of the plan, or what its crawl is expected to fetch."""
    if plan.data.path != "crawl":
        return plan.data
    size = streets(plan.crawl).bytes
    return plan.data.but(path=None, raw=size, raw_files=max(1, round(size / SHARD)))
