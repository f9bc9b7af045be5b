// Calls and calls that were taken back, a second, over the last minutes.

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 400;
const HEIGHT = 80;
/** How far back a plot goes, in milliseconds. */
export const SPAN = 5 * 60 * 1000;

/**
 * Rates between counters that were read one after the other; counters that began anew have none until the next reading.
 * @param {{at: number, calls: number, aborts: number}[]} samples
 */
export function rates(samples) {
  const rates = [];
  for (let i = 1; i < samples.length; i += 1) {
    const [before, now] = [samples[i - 1], samples[i]];
    const seconds = (now.at - before.at) / 1000;
    const anew = now.calls < before.calls || now.aborts < before.aborts;
    if (seconds > 0 && !anew) {
      rates.push({
        at: now.at,
        calls: (now.calls - before.calls) / seconds,
        aborts: (now.aborts - before.aborts) / seconds,
      });
    }
  }
  return rates;
}

/** A rate for people. */
export function rate(number) {
  if (!Number.isFinite(number)) return "–";
  return number >= 10 || number === 0 ? String(Math.round(number)) : number.toFixed(1);
}

function drawn(name, attributes) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** A drawing of `samples`, as it is at `now`, and what it shows in words. */
export function plot(samples, now) {
  const all = rates(samples);
  const svg = drawn("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": "Calls and taken-back calls a second, over the last 5 minutes",
  });
  const ground = HEIGHT - 2;
  svg.append(drawn("line", { class: "ground", x1: 0, x2: WIDTH, y1: ground, y2: ground }));
  const key = document.createElement("p");
  key.className = "facts";
  // Each has its own scale: what is taken back is far less than what is called.
  for (const [what, name] of [["calls", "calls/s"], ["aborts", "taken back/s"]]) {
    const most = Math.max(0, ...all.map((one) => one[what]));
    const points = all.map((one) => {
      const x = WIDTH * (1 - (now - one.at) / SPAN);
      const y = ground - (most > 0 ? (one[what] / most) * (HEIGHT - 4) : 0);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    });
    const line = { class: what, points: points.join(" "), "vector-effect": "non-scaling-stroke" };
    svg.append(drawn("polyline", line));
    const text = document.createElement("span");
    text.className = `key-${what}`;
    text.textContent = `— ${name}, at most ${rate(most)} `;
    key.append(text);
  }
  return [key, svg];
}
