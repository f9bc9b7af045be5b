// The service's page: looks at guests and devices, and listens to what changes. Everything that comes from a guest is
// set as text, never as markup. The token is in this script's memory alone.

import { Reports } from "/campaigns.js";
import { plot, rate, rates, SPAN } from "/plot.js";

/** Between two looks, in milliseconds. */
const LOOK_EVERY = 2000;
/** How long an answer may take. */
const ANSWER_TIME = 15000;
/** How long the stream of events may be silent: the service gives a sign of life every 15 seconds. */
const SILENCE = 40000;
/** Longest wait before the next try. */
const MOST_PATIENCE = 10000;
/** Lines in the log of events. */
const MOST_EVENTS = 300;
/** Violations that are told for one event, and characters of each. */
const MOST_TEXTS = 8;
const MOST_CHARACTERS = 2000;
/** Characters of the stream without an event's end. */
const MOST_BUFFERED = 1 << 20;

const byId = (id) => document.getElementById(id);
const wait = (time) => new Promise((resolve) => setTimeout(resolve, time));

let token = null;
/** Counters of each guest by its name and process. */
let histories = new Map();
/** What the log has told of each violation: how often it was. */
const told = new Map();

/** An element with a text and elements in it. */
function make(name, text, kind, ...inside) {
  const element = document.createElement(name);
  if (text !== undefined && text !== null) {
    element.textContent = String(text).slice(0, MOST_CHARACTERS);
  }
  if (kind) element.className = kind;
  element.append(...inside);
  return element;
}

class Unknown extends Error {}
class Refused extends Error {}

/** Asks the service. */
async function ask(path, signal) {
  const used = token;
  const headers = used === null ? {} : { authorization: `Bearer ${used}` };
  const answer = await fetch(path, { headers, signal, credentials: "omit", redirect: "error" });
  // Unless another one was given meanwhile.
  if (answer.status === 401 && token === used) throw new Unknown();
  if (answer.status === 409) throw new Refused((await answer.json()).detail);
  if (!answer.ok) throw new Error(`the service answers ${answer.status}`);
  return answer;
}

const askJson = async (path) => (await ask(path, AbortSignal.timeout(ANSWER_TIME))).json();

// --- Whether the service is there ---

const parts = { look: null, events: null };

function tellConnection(part, lost) {
  parts[part] = lost;
  const why = parts.look ?? parts.events;
  const shown = byId("connection");
  shown.textContent = why === null ? "Connected" : `${why}. Trying again…`;
  shown.classList.toggle("lost", why !== null);
  byId("shown").classList.toggle("stale", why !== null);
}

/** Does `once` again and again, and waits longer each time that it fails. */
async function forever(part, once) {
  let patience = 500;
  for (;;) {
    try {
      await once(() => {
        patience = 500;
        tellConnection(part, null);
      });
    } catch (error) {
      if (error instanceof Unknown) {
        await login(token === null ? "" : "The service does not know this token any more.");
        continue;
      }
      const since = new Date().toLocaleTimeString();
      parts[part] ?? tellConnection(part, `No connection to the service since ${since}`);
      await wait(patience);
      patience = Math.min(2 * patience, MOST_PATIENCE);
    }
  }
}

// --- Who looks ---

let asking = null;

/** Asks for a token, until the service knows it. */
function login(why) {
  asking ??= new Promise((resolve) => {
    const form = byId("login");
    const refused = byId("refused");
    token = null;
    form.hidden = false;
    byId("shown").hidden = true;
    byId("connection").textContent = "A token is needed";
    refused.textContent = why;
    byId("token").focus();
    form.onsubmit = async (event) => {
      event.preventDefault();
      const given = byId("token").value.trim();
      byId("token").value = "";
      // What cannot be in a header is no token.
      token = /^[\x21-\x7e]{1,256}$/.test(given) ? given : "";
      try {
        await askJson("/v1/jobs");
      } catch (error) {
        token = null;
        refused.textContent = error instanceof Unknown
          ? "The service does not know this token."
          : "The service does not answer. Try again.";
        return;
      }
      form.hidden = true;
      byId("shown").hidden = false;
      refused.textContent = "";
      asking = null;
      resolve();
    };
  });
  return asking;
}

// --- Guests and devices ---

function duration(milliseconds) {
  const seconds = Math.floor(milliseconds / 1000);
  const [days, hours] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24];
  const minutes = Math.floor(seconds / 60) % 60;
  if (days > 0) return `${days} d ${hours} h`;
  if (hours > 0) return `${hours} h ${minutes} min`;
  return minutes > 0 ? `${minutes} min ${seconds % 60} s` : `${seconds} s`;
}

const mebibytes = (kib) => `${(kib / 1024).toFixed(kib < 10240 ? 1 : 0)} MiB`;
const sum = (list, what) => list.reduce((all, one) => all + (Number(one[what]) || 0), 0);

/** Counters of a guest and of each of its modules, with those that were read before. */
function remember(key, modules, now) {
  const kept = (histories.get(key) ?? []).filter((sample) => now - sample.at < SPAN);
  const each = new Map(modules.map((one) => [one.module, {
    at: now,
    calls: sum(one.entries, "calls"),
    aborts: sum(one.entries, "aborts"),
  }]));
  const all = [...each.values()];
  kept.push({ at: now, calls: sum(all, "calls"), aborts: sum(all, "aborts"), each });
  return kept;
}

function table(heads, rows) {
  const head = make("tr", null, null, ...heads.map((text) => make("th", text)));
  const body = rows.map((row) => make("tr", null, null, ...row.map((text) => make("td", text))));
  const [upper, lower] = [make("thead", null, null, head), make("tbody", null, null, ...body)];
  return make("div", null, "wide", make("table", null, null, upper, lower));
}

function modulesOf(status, history) {
  const [before, now] = history.slice(-2);
  const rows = status.isolation.map((one) => {
    const pair = [before, now].map((sample) => sample?.each.get(one.module)).filter(Boolean);
    const last = rates(pair)[0];
    const ladder = status.recovery[one.module];
    const rungs = ladder?.rungs ?? {};
    const state = one.broken ? "broken" : (ladder?.state ?? "isolated");
    return [one.module, state, rate(last?.calls), sum(one.entries, "aborts"),
      rungs.errors ?? 0, rungs.retries ?? 0, rungs.restarts ?? 0, rungs.resets ?? 0,
      rungs.stops ?? 0];
  });
  const heads = ["Module", "State", "Calls/s", "Taken back",
    "Errors", "Retries", "Restarts", "Resets", "Stops"];
  return table(heads, rows);
}

function guestCard(listed, now, histories) {
  const status = listed.status;
  const state = !status ? "no answer" : status.guest_panic ? "panicked" : status.state;
  const isBad = ["no answer", "panicked"].includes(state);
  const mood = state === "running" ? "running" : isBad ? "bad" : "";
  const head = make("header", null, null, make("h3", listed.name), make("span", state, mood));
  const card = make("section", null, "card guest", head);
  if (!status) {
    card.append(make("p", listed.no_answer ?? "It does not answer.", "facts"));
    return card;
  }
  const [guest, vmm] = [mebibytes(status.guest_rss_kib), mebibytes(status.vmm_rss_kib)];
  const resets = status.resets > 0 ? `, ${status.resets} resets` : "";
  const up = `up ${duration(status.uptime_ms)}${resets}`;
  card.append(make("p", `${up}; resident: ${guest} of the guest, ${vmm} of the VMM`, "facts"));
  if (status.guest_panic) card.append(make("p", status.guest_panic, "facts bad"));
  if (status.isolation.length > 0) {
    const key = JSON.stringify([listed.name, listed.pid]);
    const history = remember(key, status.isolation, now);
    histories.set(key, history);
    card.append(modulesOf(status, history), ...plot(history, now));
    const wrong = status.isolation.filter((one) => one.violations > 0);
    card.append(...wrong.map((one) =>
      reports.ofModule(listed.name, listed.pid, one.module, one.violations)));
  }
  return card;
}

function deviceCard(listed) {
  const status = listed.status;
  const turn = status?.turn ? `turn: ${status.turn}` : "nobody has the turn";
  const head = make("header", null, null, make("h3", listed.name),
    make("span", status ? turn : "no answer", status ? "" : "bad"));
  const card = make("section", null, "card device", head);
  if (!status) {
    card.append(make("p", listed.no_answer ?? "It does not answer.", "facts"));
    return card;
  }
  const passed = status.every_ms ? `, passed on every ${status.every_ms} ms` : "";
  const switches = `${status.switch_count} switches, ${status.failed_switches} failed`;
  const up = `up ${duration(status.uptime_ms)}`;
  card.append(make("p", `${status.model}${passed}; ${up}; ${switches}`, "facts"));
  const rows = status.contexts.map((one) => [one.vm, one.turn ? "has the turn" : "waits",
    one.attached ? "attached" : "gone"]);
  if (rows.length > 0) card.append(table(["Guest", "Turn", ""], rows));
  return card;
}

const reports = new Reports({ make, table, ask, askJson });

/** What a service without a folder for campaigns refuses is nothing. */
async function campaigns() {
  try {
    return (await askJson("/v1/campaigns")).campaigns;
  } catch (error) {
    if (error instanceof Refused) return [];
    throw error;
  }
}

/** Fills a part of the page, or says that there is nothing for it. */
function fill(id, cards, none) {
  byId(id).replaceChildren(...(cards.length > 0 ? cards : [make("p", none)]));
}

/** Parts of the page that are being asked for. */
const asked = new Set();

/** Asks for a part of the page. What is wrong with it is said there, and is nothing to the others. */
async function show(id, get, cards, none) {
  if (asked.has(id)) return;
  asked.add(id);
  try {
    fill(id, cards(await get()), none);
  } catch (error) {
    // That the service is not there, or does not know the token, is said for the whole page.
    if (error instanceof Unknown || error instanceof TypeError) return;
    byId(id).replaceChildren(make("p", `This cannot be shown: ${error.message}`, "facts bad"));
  } finally {
    asked.delete(id);
  }
}

const others = () => Promise.all([
  show("devices", () => askJson("/v1/devices"), (all) => all.devices.map(deviceCard),
    "No device host runs."),
  show("campaigns", campaigns, (all) => reports.campaigns(all), "There are no campaigns."),
  show("jobs", () => askJson("/v1/jobs"), (all) => reports.jobs(all.jobs),
    "Nothing that takes long is done."),
]);

async function look(here) {
  const rest = others();
  const guests = await askJson("/v1/guests");
  const now = performance.now();
  const kept = new Map(histories);
  const cards = guests.guests.map((listed) => guestCard(listed, now, kept));
  const there = new Set(guests.guests.map((listed) => JSON.stringify([listed.name, listed.pid])));
  histories = new Map([...kept].filter(([key]) => there.has(key)));
  fill("guests", cards, "No guest runs.");
  reports.sweep("module");
  byId("shown").hidden = false;
  here();
  // One that takes long is not waited for.
  await Promise.race([rest, wait(LOOK_EVERY)]);
  await wait(LOOK_EVERY);
}

// --- Events ---

function log(text, details) {
  const time = make("time", new Date().toLocaleTimeString());
  const line = make("li", null, null, time, make("span", text));
  if (details) line.append(make("pre", details));
  const events = byId("events");
  events.prepend(line);
  while (events.childElementCount > MOST_EVENTS) events.lastElementChild.remove();
}

const counted = (number, one, more) => `${number} ${number === 1 ? one : more}`;

const TEXTS = {
  now: (e) => `Listening: ${counted(Object.keys(e.guests).length, "guest", "guests")}, ` +
    counted(Object.keys(e.devices).length, "device", "devices"),
  guest_appeared: (e) => `${e.guest} is there, ${e.state}`,
  guest_gone: (e) => `${e.guest} is gone`,
  guest_state: (e) => `${e.guest}: ${e.state}, before: ${e.before}`,
  violations: (e) =>
    `${e.guest}: ${counted(e.more, "call", "calls")} of ${e.module} failed, ${e.count} in all`,
  recovery: (e) => `${e.guest}: ${e.module} is ${e.state ?? "isolated no more"}`,
  device_appeared: (e) => `${e.device} is there, turn: ${e.turn ?? "nobody"}`,
  device_gone: (e) => `${e.device} is gone`,
  turn: (e) =>
    `${e.device}: the turn went from ${e.before ?? "nobody"} to ${e.turn ?? "nobody"}, ` +
    counted(e.switches, "switch", "switches"),
  dropped: (e) => e.reason,
};

/** What calls of a module did wrong that was not told before. */
async function tellViolations({ guest, module }) {
  const [one, other] = [encodeURIComponent(guest), encodeURIComponent(module)];
  const { violations } = await askJson(`/v1/guests/${one}/isolation/${other}/violations`);
  const key = (one) => JSON.stringify([guest, module, one.entry, one.text]);
  const fresh = violations.filter((one) => told.get(key(one)) !== one.count);
  if (told.size > 10000) told.clear();
  for (const one of fresh) told.set(key(one), one.count);
  for (const one of fresh.slice(0, MOST_TEXTS)) {
    log(`${guest}: ${module}: ${one.entry}, ${counted(one.count, "time", "times")}`, one.text);
  }
  if (fresh.length > MOST_TEXTS) log(`${guest}: ${module}: ${fresh.length - MOST_TEXTS} more`);
}

/** Modules whose violations are to be asked for, one after the other. */
const sought = new Map();
let seeking = false;

async function seek(event) {
  sought.set(JSON.stringify([event.guest, event.module]), event);
  if (seeking) return;
  seeking = true;
  while (sought.size > 0) {
    const [key, next] = sought.entries().next().value;
    sought.delete(key);
    // The guest may have gone; that is told by another event.
    await tellViolations(next).catch(() => {});
  }
  seeking = false;
}

function heard(event) {
  const text = TEXTS[event.event];
  log(text ? text(event) : `something else: ${event.event}`);
  if (event.event === "violations") seek(event);
  if (event.event === "dropped") throw new Error(event.reason);
}

/** Events of a stream, as they come. */
async function listen(here) {
  const stop = new AbortController();
  let silence = setTimeout(() => stop.abort(), SILENCE);
  try {
    const answer = await ask("/v1/events", stop.signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    here();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the stream ended");
      clearTimeout(silence);
      silence = setTimeout(() => stop.abort(), SILENCE);
      const blocks = (buffer + value).split("\n\n");
      buffer = blocks.pop();
      if (buffer.length > MOST_BUFFERED) throw new Error("an event has no end");
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data: "));
        if (data.length > 0) heard(JSON.parse(data.map((line) => line.slice(6)).join("\n")));
      }
    }
  } finally {
    clearTimeout(silence);
    stop.abort();
  }
}

forever("look", look);
forever("events", listen);
