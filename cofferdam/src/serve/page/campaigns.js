// Campaigns, jobs and reports: what is looked at when somebody opens it. All text is set as text.

/** Trials to be looked at that are listed of one campaign. */
const MOST_TRIALS = 50;
/** Figures of a campaign that is under way are read anew when its file is so much longer, */
const LONGER = 1.5;
/** and those of a file of fewer bytes after so many milliseconds, too. */
const SMALL = 8 << 20;
const REFRESH_EVERY = 30000;
/** Reports of a module that are shown, the last ones. */
const MOST_REPORTS = 8;

const WAYS = { native: "native", once: "isolated, once", stays: "isolated, stays" };
const words = (name) => name.replaceAll("_", " ");
const total = (counts) => Object.values(counts ?? {}).reduce((sum, one) => sum + one, 0);
const under = (...parts) => `/v1/${parts.map(encodeURIComponent).join("/")}`;

/** Shows them with what the page makes elements and requests by. */
export class Reports {
  /** @param tools `make`, `table`, `ask` and `askJson` of the page */
  constructor(tools) {
    this.tools = tools;
    /** What was opened stays as it is, while what is around it is made anew. */
    this.opened = new Map();
    /** Of the campaigns by name: how long its file was when its figures were read, and when. */
    this.read = new Map();
  }

  /** A line that opens: `fill` gives what is in it, each time that `version` is another one. */
  opening(key, title, version, fill) {
    const { make } = this.tools;
    let one = this.opened.get(key);
    if (!one) {
      const summary = make("summary");
      const inside = make("div", null, "inside");
      const element = make("details", null, null, summary, inside);
      one = { element, summary, inside, shown: undefined, fill, version };
      this.opened.set(key, one);
      element.addEventListener("toggle", () => this.refill(one));
    }
    one.used = true;
    one.fill = fill;
    one.version = version;
    one.summary.textContent = title;
    this.refill(one);
    return one.element;
  }

  async refill(one) {
    const { make } = this.tools;
    if (!one.element.open || one.filling || one.shown === one.version) return;
    one.filling = true;
    const version = one.version;
    try {
      one.inside.replaceChildren(...(await one.fill()));
      one.shown = version;
    } catch (error) {
      one.inside.replaceChildren(make("p", `It cannot be shown: ${error.message}`, "facts bad"));
    } finally {
      one.filling = false;
    }
  }

  /** Forgets what of a kind is not there any more: all, or those in `within`. */
  sweep(kind, within) {
    for (const [key, one] of this.opened) {
      const [its, name] = JSON.parse(key);
      if (its !== kind || (within !== undefined && name !== within)) continue;
      if (!one.used) this.opened.delete(key);
      one.used = false;
    }
  }

  /** What calls of a guest's module did wrong. */
  ofModule(guest, pid, module, count) {
    const key = JSON.stringify(["module", guest, pid, module]);
    const title = `What ${count} calls of ${module} did wrong`;
    return this.opening(key, title, count, async () => {
      const { make, askJson } = this.tools;
      const path = under("guests", guest, "isolation", module, "violations");
      const { violations, last_texts: texts } = await askJson(path);
      const rows = violations.map((one) => [one.entry, one.count]);
      const reports = texts.length > 0 ? texts : violations.map((one) => one.text);
      const shown = reports.slice(-MOST_REPORTS).reverse();
      return [this.tools.table(["Function", "Times"], rows), ...shown.map((text) => make("pre", text))];
    });
  }

  /** The table of verdicts by way. */
  verdicts(ways) {
    const there = Object.keys(WAYS).filter((way) => ways[way]);
    const all = [...new Set(there.flatMap((way) => Object.keys(ways[way])))];
    const rows = all.map((verdict) => [words(verdict), ...there.map((way) => ways[way][verdict] ?? "")]);
    return this.tools.table(["How it ended", ...there.map((way) => WAYS[way])], rows);
  }

  /** A campaign's figures, plots and trials to be looked at. */
  async figures(name) {
    const { make, table, ask, askJson } = this.tools;
    const { summary, plots, bytes } = await askJson(under("campaigns", name));
    this.read.set(name, { bytes, at: performance.now() });
    const parts = [this.verdicts(summary.ways)];
    if (Object.keys(summary.of_harm).length > 0) {
      parts.push(make("p", "Of those that harm natively:", "facts"), this.verdicts(summary.of_harm));
    }
    const kinds = Object.entries(summary.kinds).map(([kind, ways]) =>
      [words(kind), ...Object.keys(WAYS).map((way) => total(ways[way]) || "")]);
    parts.push(table(["Kind", ...Object.values(WAYS)], kinds));
    for (const plot of plots) {
      const answer = await ask(under("campaigns", name, "plots", plot), AbortSignal.timeout(60000));
      const image = make("img", null, "plot");
      image.alt = `Plot: ${plot}`;
      // An image runs no scripts and loads nothing, whatever is in it.
      image.src = `data:image/svg+xml,${encodeURIComponent(await answer.text())}`;
      const what = plot.replace(".svg", "").replace("-", ", ");
      parts.push(make("p", `Plot: ${what}`, "facts"), image);
    }
    for (const [verdict, trials] of Object.entries(summary.to_look_at)) {
      const shown = trials.slice(0, MOST_TRIALS).map((number) => this.trial(name, number, verdict));
      parts.push(...shown);
      if (trials.length > shown.length) {
        parts.push(make("p", `${trials.length - shown.length} more ${words(verdict)}`, "facts"));
      }
    }
    this.sweep("trial", name);
    return parts;
  }

  /** A trial, with all that was seen of it. It stays while the figures around it are made anew. */
  trial(name, number, verdict) {
    const { make, askJson } = this.tools;
    const key = JSON.stringify(["trial", name, number, verdict]);
    return this.opening(key, `Trial ${number}: ${words(verdict)}`, 0, async () => {
      const record = await askJson(under("campaigns", name, "trials", number));
      const runs = Object.entries(record.runs).flatMap(([way, run]) => [
        make("p", `${WAYS[way]}: ${words(run.verdict)}`, "facts"),
        make("pre", run.seen.violation?.says ?? [...(run.seen.log ?? []), ...(run.seen.differs ?? [])].join("\n")),
      ]);
      return [make("p", record.says), ...runs];
    });
  }

  /** Which figures of a campaign are to be shown: each time the whole file is read, several times. */
  version({ name, bytes, job }) {
    const read = this.read.get(name);
    if (!read || !job || bytes < read.bytes || bytes >= LONGER * read.bytes) return bytes;
    const isOld = performance.now() - read.at >= REFRESH_EVERY;
    const shown = this.opened.get(JSON.stringify(["campaign", name]));
    return bytes < SMALL && isOld ? bytes : (shown?.version ?? bytes);
  }

  /** Cards of campaigns. */
  campaigns(list) {
    const { make } = this.tools;
    const cards = list.map((one) => {
      const state = one.unreadable ? "cannot be read" : one.job ? "under way" : "";
      const head = make("header", null, null, make("h3", one.name),
        make("span", state, one.unreadable ? "bad" : "running"));
      const what = one.what;
      const facts = one.unreadable ?? (what
        ? `${what.driver}, ${what.kernel}, seed ${what.seed}, ${what.kinds.length} kinds`
        : "its first guest boots");
      const card = make("section", null, "card campaign", head, make("p", facts, "facts"));
      if (what) {
        const key = JSON.stringify(["campaign", one.name]);
        const fill = () => this.figures(one.name);
        card.append(this.opening(key, "Figures and plots", this.version(one), fill));
      }
      return card;
    });
    this.sweep("campaign");
    const there = new Set(list.map((one) => one.name));
    for (const name of this.read.keys()) {
      if (there.has(name)) continue;
      this.read.delete(name);
      this.sweep("trial", name);
    }
    return cards;
  }

  /** Cards of jobs, the latest first. */
  jobs(list) {
    const { make } = this.tools;
    return list.toReversed().map((job) => {
      const mood = { running: "running", failed: "bad" }[job.stage];
      const name = `${job.what} of ${job.guest ?? job.campaign}`;
      const head = make("header", null, null, make("h3", name), make("span", job.stage, mood));
      const card = make("section", null, "card job", head);
      const figures = job.figures;
      if (figures) {
        const left = job.stage === "running" ? `, some ${figures.left_s} s left` : "";
        const bar = make("progress");
        [bar.max, bar.value] = [figures.of, figures.trials];
        card.append(bar, make("p", `${figures.trials} of ${figures.of} trials${left}`, "facts"),
          this.verdicts(figures.ways));
      }
      const last = job.problem?.detail ?? job.progress.at(-1);
      if (last) card.append(make("p", last, job.problem ? "facts bad" : "facts"));
      return card;
    });
  }
}
