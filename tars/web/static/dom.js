// Small tools for building the page. Law of this file: text reaches the page through textContent only, never as HTML.

/** An element: `h("p", {class: "muted"}, "text", child)`. `text` children become text nodes; null children are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set an element's text only where it changed, so that a selection on the page survives the next second. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Make `container` show `items`, one element each, in order. Elements are kept by key and updated in place.
 * `make()` returns {element, update(item)}; `empty` is what stands there when there are no items.
 */
export function keyed(container, items, keyOf, make, empty = "") {
  const known = (container.views ??= new Map());
  const seen = new Set();
  let place = 0;
  for (const item of items) {
    let key = keyOf(item);
    while (seen.has(key)) key += "+";
    seen.add(key);
    let view = known.get(key);
    if (!view) known.set(key, (view = make(item)));
    view.update(item);
    if (container.children[place] !== view.element) container.insertBefore(view.element, container.children[place] ?? null);
    place += 1;
  }
  for (const [key, view] of known) {
    if (!seen.has(key)) {
      view.element.remove();
      known.delete(key);
    }
  }
  while (container.children.length > place) container.lastElementChild.remove();
  if (place === 0 && empty) container.append(h("p", { class: "empty" }, empty));
}

/** Fill a <dl> with [term, text, class?] rows in place; rows whose text is null are left out. */
export function facts(list, rows) {
  keyed(list, rows.filter(([, text]) => text !== null && text !== undefined), ([term]) => term, ([term]) => {
    const value = h("dd");
    const element = h("div", {}, h("dt", {}, term), value);
    return {
      element,
      update: ([, text, kind]) => {
        setText(value, text);
        element.className = kind ?? "";
      },
    };
  });
}

const STATE_KINDS = {
  ready: "good", alive: "good",
  loading: "busy", starting: "busy", restarting: "busy", draining: "busy", stopping: "busy", suspect: "busy",
  failed: "bad", refused: "bad", dead: "bad", "not served": "bad",
};

/** Show a state in its pill. */
export function showState(pill, state) {
  setText(pill, state);
  pill.className = `pill ${STATE_KINDS[state] ?? ""}`;
  pill.hidden = false;
}

/** Show labels as tags: `[text, class?]` each. */
export function showTags(container, labels) {
  keyed(container, labels, ([text]) => text, ([text, kind]) => ({ element: h("span", { class: kind ? `tag ${kind}` : "tag" }, text), update() {} }));
}

/** Fill a memory bar made by `memoryBar`; returns what it says in words, also for screen readers. */
export function showMemory(bar, device) {
  const total = Math.max(device.memory_total_bytes, 1);
  const held = Math.min(device.memory_held_bytes, total);
  const other = Math.max(0, total - device.memory_free_bytes - held);
  const bound = Math.min(device.memory_capacity_bytes, total);
  const percent = (part) => `${((part / total) * 100).toFixed(2)}%`;
  bar.held.style.width = percent(held);
  bar.other.style.width = percent(other);
  bar.limit.style.left = `calc(${percent(bound)} - 2px)`;
  bar.limit.hidden = bound >= total * 0.985;
  const words = { held: bytes(held), other: bytes(other), free: bytes(device.memory_free_bytes), total: bytes(total), bound: bytes(bound) };
  bar.element.setAttribute("aria-label", `memory of ${device.name}: ${words.held} held by TARS, ${words.other} by others, ${words.free} free of ${words.total}`);
  return words;
}

/** A bar that shows who holds a device's memory. */
export function memoryBar() {
  const [held, other, limit] = ["held", "used-other", "limit"].map((name) => h("span", { class: name }));
  return { element: h("div", { class: "memory-bar", role: "img" }, held, other, limit), held, other, limit };
}

/** Bytes for people, as TARS writes them everywhere: 5.1 GiB, 374 MiB. */
export function bytes(count) {
  if (count >= 2 ** 30) return `${(count / 2 ** 30).toFixed(1)} GiB`;
  if (count >= 2 ** 20) return `${Math.round(count / 2 ** 20)} MiB`;
  return count ? `${Math.round(count / 2 ** 10)} KiB` : "0";
}

/** Seconds for people: 45 s, 3 min, 2 h 5 min, 4 d 2 h. */
export function duration(seconds) {
  const whole = Math.floor(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** A moment of the day in the viewer's own notation. */
export function clock(date) {
  return date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

/** Counts with thin separators: 12,431. */
export const count = (number) => number.toLocaleString("en");
