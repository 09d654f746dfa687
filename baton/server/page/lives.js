// The lives of requests, assembled from the router's state changes. The same rules as baton/timeline.py.

export const STAGES = [
  ["queue", "queue"], ["reserve", "reserve blocks"], ["wait", "wait for a fill batch"], ["prefill", "prefill"],
  ["handover", "KV hand-over"], ["decode", "decode"], ["stall", "stall (no token for 0.5 s)"],
];
const NAMES = { queued: "queue", reserving: "reserve", reserved: "wait", filling: "prefill", decoding: "decode" };
const STALL_S = 0.5;
const KEPT_S = 150;
export const QUEUE = "queue";

/** A worker's name without its last part, which tells one boot from another. */
export function shortName(worker) {
  return worker.slice(0, Math.max(worker.lastIndexOf("."), 0)) || worker;
}

export class Lives {
  constructor() {
    this.all = new Map(); // request -> life
    this.lanes = new Map(); // name -> {bars, rows: time at which each row is free}
    this.shared = new Set(); // short names of several workers that are there at once
    this.lane(QUEUE);
  }

  /** The workers of the cluster. Several that were started with one name go by their full names. */
  workers(all) {
    const alive = all.filter((each) => each.state === "alive").map((each) => shortName(each.worker));
    this.shared = new Set(alive.filter((name, index) => alive.indexOf(name) !== index));
    this.known = new Set(all.map((each) => this.label(each.worker)));
    for (const name of this.known) this.lane(name);
  }

  label(worker) {
    const short = shortName(worker);
    return this.shared.has(short) ? worker : short;
  }

  lane(name) {
    if (!this.lanes.has(name)) this.lanes.set(name, { bars: [], rows: [] });
    return this.lanes.get(name);
  }

  /** Lanes from top to bottom: the queue, prefill workers, decode workers. */
  ordered() {
    const rank = (name) => (name === QUEUE ? 0 : name.startsWith("prefill") ? 1 : 2);
    return [...this.lanes.keys()].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  }

  add(moment) {
    let life = this.all.get(moment.request);
    if (!life || (life.ended && moment.state === "queued")) {
      life = { request: moment.request, bars: [], prompt: 0, tokens: 0, ended: "", first: null };
      this.all.set(moment.request, life);
    }
    if (life.ended) return;
    const open = life.bars.at(-1);
    const at = open ? Math.max(moment.at, open.start) : moment.at;
    if (moment.state === "queued" && !open) life.prompt = moment.tokens;
    if (moment.state === "decoding" || moment.state === "finished") life.tokens = Math.max(life.tokens, moment.tokens);
    if (moment.state === "decoding" && moment.tokens > 0) life.first ??= at;
    if (moment.transport) [life.transport, life.moved] = [moment.transport, moment.moved_bytes];
    if (open?.stage === "decode" && moment.gap_s > STALL_S) {
      const last = Math.max(open.start, at - moment.gap_s);
      this.close(life, last);
      this.begin(life, "stall", last, open.lane);
      this.close(life, at);
      this.begin(life, "decode", at, open.lane);
    }
    if (moment.state === "decoding" && life.bars.at(-1)?.stage === "decode") return;
    if (open) {
      if (open.stage === "prefill" && moment.handover_s > 0) {
        const from = this.cut(life, at - moment.handover_s);
        this.begin(life, "handover", from, open.lane);
      }
      if (moment.state === "decoding" && (open.stage === "prefill" || open.stage === "handover")) life.bars.at(-1).handover = true;
      this.close(life, at);
    }
    if (moment.state === "finished") {
      life.ended = moment.note || "finished";
      return;
    }
    const stage = NAMES[moment.state];
    const worker = this.label(moment.worker);
    this.begin(life, stage, at, stage === "prefill" || stage === "decode" ? worker : QUEUE);
  }

  begin(life, stage, start, name) {
    const lane = this.lane(name);
    const before = life.bars.at(-1);
    let row;
    if (before?.lane === name && before.end === start) row = before.row;
    else {
      row = lane.rows.findIndex((free) => free <= start);
      if (row < 0) row = lane.rows.length;
    }
    lane.rows[row] = Infinity;
    const next = before?.lane === name && before.stage === stage && before.end === start; // a chunk after a chunk
    const bar = { life, stage, start, end: null, lane: name, row, next };
    life.bars.push(bar);
    lane.bars.push(bar);
  }

  /** The prefill ends here, in this chunk or an earlier one. */
  cut(life, at) {
    let last = life.bars.at(-1);
    while (last.start > at && last.next) {
      last.start = last.end = Math.min(last.end ?? last.start, last.start);
      this.lanes.get(last.lane).bars = this.lanes.get(last.lane).bars.filter((bar) => bar !== last);
      life.bars.pop();
      last = life.bars.at(-1);
    }
    last.end = null;
    this.close(life, Math.max(last.start, at));
    return last.end;
  }

  close(life, at) {
    const bar = life.bars.at(-1);
    if (!bar || bar.end !== null) return;
    bar.end = Math.max(at, bar.start);
    this.lanes.get(bar.lane).rows[bar.row] = bar.end;
  }

  /** Forget requests that have left the visible time range. */
  prune(now) {
    const old = now - KEPT_S;
    for (const [name, lane] of this.lanes) {
      lane.bars = lane.bars.filter((bar) => bar.end === null || bar.end > old);
      while (lane.rows.length && lane.rows.at(-1) < old) lane.rows.pop();
      if (!lane.bars.length && name !== QUEUE && !this.known?.has(name)) this.lanes.delete(name);
    }
    for (const [request, life] of this.all) {
      const end = life.bars.at(-1)?.end;
      if (life.ended && (end === undefined || end < old)) this.all.delete(request);
    }
  }
}
