// A click on a picture of the gallery tells the server which job it is of.
element.addEventListener("click", (event) => {
  const tile = event.target.closest("[data-id]");
  if (tile) trigger("select", { id: tile.dataset.id });
});
