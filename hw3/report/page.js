"use strict";
// Searches, filters and sorts the rows, and shows 25 at a time. Without this script, all rows are shown in file order.
for (const form of document.querySelectorAll(".controls")) {
  const PAGE_SIZE = 25;
  const list = form.nextElementSibling;
  const more = list.nextElementSibling;
  const rows = Array.from(list.children, (element) => ({
    element,
    keys: element.dataset.keys.split(" ").map(Number),
    text: element.textContent.toLowerCase(),
  }));
  let limit = PAGE_SIZE;

  function show() {
    const words = form.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const order = Number(form.order.value);
    const found = rows
      .filter(({ element, text }) =>
        (!form.direction.value || element.dataset.direction === form.direction.value) &&
        words.every((word) => text.includes(word)))
      .sort((a, b) => a.keys[order] - b.keys[order] || a.keys[0] - b.keys[0]);
    list.replaceChildren(...found.slice(0, limit).map(({ element }) => element));
    const output = form.querySelector("output");
    output.textContent = output.dataset.text
      .replace("(shown)", Math.min(limit, found.length)).replace("(found)", found.length);
    more.hidden = found.length <= limit;
  }

  function restart() {
    limit = PAGE_SIZE;
    show();
  }
  form.addEventListener("input", restart);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.querySelector("button").addEventListener("click", () => {
    limit += PAGE_SIZE;
    show();
  });
  form.hidden = false;
  show();
}
