// The legend: colour, area and confidence of every class that is there, and the names of those that are not.

const ABSENT = 60; // names at most: nobody reads more

// "#ff8000" -> [255, 128, 0]
export function colourOf(text) {
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
}

function swatch(color) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const square = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [key, value] of Object.entries({width: "100%", height: "100%", fill: color})) square.setAttribute(key, value);
  svg.append(square);
  return svg;
}

// `choose(index)` is called when a class is clicked, `point(index or null)` when the pointer is on its line.
export function writeLegend(table, below, classes, {choose, point}) {
  const button = (entry, ...content) => {
    const made = Object.assign(document.createElement("button"), {type: "button", title: "heat map of this class"});
    made.append(...content);
    made.addEventListener("click", () => choose(entry.index));
    return made;
  };
  const present = classes.filter((entry) => entry.area > 0).sort((a, b) => b.area - a.area);
  table.tBodies[0].replaceChildren(...present.map((entry) => {
    const row = document.createElement("tr");
    row.dataset.index = entry.index;
    const area = entry.area < 0.001 ? "<0.1%" : `${(100 * entry.area).toFixed(1)}%`;
    const contents = [button(entry, swatch(entry.color), entry.class), area, entry.confidence.toFixed(2)];
    row.append(...contents.map((content) => {
      const cell = document.createElement("td");
      cell.append(content);
      return cell;
    }));
    row.addEventListener("mouseenter", () => point(entry.index));
    row.addEventListener("mouseleave", () => point(null));
    return row;
  }));
  const absent = classes.filter((entry) => entry.area === 0);
  below.replaceChildren(
    ...(absent.length ? ["Nowhere: "] : []),
    ...absent.slice(0, ABSENT).map((entry) => button(entry, entry.class)),
    ...(absent.length > ABSENT ? [` and ${absent.length - ABSENT} more`] : []),
  );
}
