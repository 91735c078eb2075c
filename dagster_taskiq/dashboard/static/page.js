// Keeps the page up to date: takes the parts that have changed and changes only what differs, so
// that the focus, a selected text and the place on the page stay.
"use strict";

(() => {
  const root = document.getElementById("parts");
  const live = document.getElementById("live");
  const SILENCE_MS = 15000;
  let lastWord = Date.now();
  let source = null;

  const say = (tone, text, title) => {
    if (live.textContent !== text) live.textContent = text;
    live.className = tone;
    live.title = title;
  };

  // --- one part into its new shape ---

  const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.dataset.key : undefined);

  const isSame = (one, other) =>
    one.nodeType === other.nodeType && one.nodeName === other.nodeName && keyOf(one) === keyOf(other);

  function morph(old, fresh) {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    morphChildren(old, fresh);
  }

  function morphChildren(old, fresh) {
    const keyed = new Map();
    for (const child of old.childNodes) {
      if (keyOf(child)) keyed.set(keyOf(child), child);
    }
    let place = old.firstChild;
    for (const wanted of [...fresh.childNodes]) {
      const key = keyOf(wanted);
      let found = key ? keyed.get(key) : place;
      if (!found || !isSame(found, wanted)) found = null;
      if (found) {
        if (found === place) place = place.nextSibling;
        else old.insertBefore(found, place);
        morph(found, wanted);
      } else {
        old.insertBefore(wanted, place);
      }
    }
    while (place) {
      const next = place.nextSibling;
      place.remove();
      place = next;
    }
  }

  function show(parts) {
    for (const [name, html] of Object.entries(parts)) {
      const section = root.querySelector(`[data-part="${name}"]`);
      if (!section) continue;
      const fresh = document.createElement("template");
      fresh.innerHTML = html; // from our own templates, which have escaped every text
      morphChildren(section, fresh.content);
    }
  }

  // a tab that nobody looks at says how much needs somebody
  const title = document.title;
  function count() {
    const problems = document.querySelectorAll(".alert.bad").length;
    document.title = problems ? `(${problems}) ${title}` : title;
  }

  // --- the stream ---

  function listen() {
    if (source) source.close();
    source = new EventSource(root.dataset.events);
    source.onmessage = (event) => {
      lastWord = Date.now();
      say("good", "live", "The page changes by itself.");
      show(JSON.parse(event.data));
      count();
    };
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) {
        say("bad", "not live", "The page was refused: load it again, and log in if you are asked.");
      } else {
        say("bad", "connection lost", "The page shows what was last seen, and tries again.");
      }
    };
  }

  // a window that nobody sees asks for nothing
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      if (source) source.close();
      say("calm", "rests", "The page goes on when it is looked at.");
    } else {
      lastWord = Date.now();
      listen();
    }
  });

  setInterval(() => {
    if (document.hidden || Date.now() - lastWord < SILENCE_MS) return;
    lastWord = Date.now();
    say("bad", "connection lost", "The page shows what was last seen, and tries again.");
    listen(); // also where the browser has given up by itself
  }, 1000);

  say("calm", "connecting", "");
  if (!document.hidden) listen();
})();
