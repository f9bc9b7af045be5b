// Campaigns, jobs and reports: what is looked at when somebody opens it. All text is set as text.

/** Trials to be looked at that are listed of one campaign. */
const MOST_TRIALS = 50;
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

  /** Forgets what is not there any more. */
  sweep() {
    for (const [key, one] of this.opened) {
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
    const { summary, plots } = await askJson(under("campaigns", name));
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
    return parts;
  }

  /** A trial, with all that was seen of it. It is thrown away with the figures around it. */
  trial(name, number, verdict) {
    const { make, askJson } = this.tools;
    const inside = make("div", null, "inside");
    const title = make("summary", `Trial ${number}: ${words(verdict)}`);
    const element = make("details", null, null, title, inside);
    element.addEventListener("toggle", async () => {
      if (!element.open || inside.childElementCount > 0) return;
      try {
        const record = await askJson(under("campaigns", name, "trials", number));
        const runs = Object.entries(record.runs).flatMap(([way, run]) => [
          make("p", `${WAYS[way]}: ${words(run.verdict)}`, "facts"),
          make("pre", run.seen.violation?.says ?? [...(run.seen.log ?? []), ...(run.seen.differs ?? [])].join("\n")),
        ]);
        inside.replaceChildren(make("p", record.says), ...runs);
      } catch (error) {
        inside.replaceChildren(make("p", `It cannot be shown: ${error.message}`, "facts bad"));
      }
    });
    return element;
  }

  /** Cards of campaigns. */
  campaigns(list) {
    const { make } = this.tools;
    return list.map((one) => {
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
        card.append(this.opening(key, "Figures and plots", one.bytes, () => this.figures(one.name)));
      }
      return card;
    });
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
