"use strict";
// Search, direction and order of the rows; 25 at a time. Without this script all rows are shown in file order.
for (const form of document.querySelectorAll(".controls")) {
  const STEP = 25;
  const list = form.nextElementSibling;
  const more = list.nextElementSibling;
  const cards = Array.from(list.children, (card) => ({
    card,
    keys: card.dataset.keys.split(" ").map(Number),
    text: card.textContent.toLowerCase(),
  }));
  let room = STEP;

  function show() {
    const words = form.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const order = Number(form.order.value);
    const found = cards
      .filter(({ card, text }) =>
        (!form.direction.value || card.dataset.direction === form.direction.value) &&
        words.every((word) => text.includes(word)))
      .sort((a, b) => a.keys[order] - b.keys[order] || a.keys[0] - b.keys[0]);
    list.replaceChildren(...found.slice(0, room).map(({ card }) => card));
    form.querySelector("output").textContent = `${Math.min(room, found.length)} of ${found.length} rows`;
    more.hidden = found.length <= room;
  }

  function restart() {
    room = STEP;
    show();
  }
  form.addEventListener("input", restart);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.querySelector("button").addEventListener("click", () => {
    room += STEP;
    show();
  });
  form.hidden = false;
  show();
}
