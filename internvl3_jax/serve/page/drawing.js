// Draws an image with its tiles, and with the boxes and points of an answer.

const COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324"];
const NUMBER = "\\s*(-?\\d+(?:\\.\\d+)?)\\s*";
const PAIR = `\\[${NUMBER},${NUMBER}\\]`;
const BOX = `\\[${NUMBER},${NUMBER},${NUMBER},${NUMBER}\\]`;

// The shapes of an answer, in thousandths of the image's sides: {label, points}.
export function shapesOf(text) {
  const shapes = [];
  const parts = /(?:<ref>(.*?)<\/ref>\s*)?<(box|quad)>(.*?)<\/\2>/gs;
  for (const [, label, kind, inside] of text.matchAll(parts)) {
    if (kind === "box") {
      for (const [, a, b, c, d] of inside.matchAll(new RegExp(BOX, "g"))) {
        const [x0, y0, x1, y1] = [a, b, c, d].map(Number);
        shapes.push({ label: label ?? "", points: [[x0, y0], [x1, y0], [x1, y1], [x0, y1]] });
      }
    } else {
      const points = [...inside.matchAll(new RegExp(PAIR, "g"))].map(([, x, y]) => [+x, +y]);
      if (points.length > 2) shapes.push({ label: label ?? "", points });
    }
  }
  return shapes;
}

const SHORTEST = 320; // pixels of the longer side to which small images are enlarged

// Draws a bitmap with at most `longest` pixels on its longer side.
export function draw(canvas, bitmap, { tiles = null, shapes = [], longest = 900 } = {}) {
  const side = Math.max(bitmap.width, bitmap.height);
  const scale = Math.min(Math.max(1, SHORTEST / side), longest / side);
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (tiles) drawTiles(context, canvas, tiles);
  shapes.forEach((shape, index) => drawShape(context, canvas, shape, COLORS[index % COLORS.length]));
}

function drawTiles(context, canvas, { columns, rows }) {
  context.save();
  for (const [color, width] of [["#000000a0", 3], ["#ffffff", 1]]) {
    context.strokeStyle = color;
    context.lineWidth = width;
    context.beginPath();
    for (let column = 1; column < columns; column += 1) {
      const x = (canvas.width * column) / columns;
      context.moveTo(x, 0);
      context.lineTo(x, canvas.height);
    }
    for (let row = 1; row < rows; row += 1) {
      const y = (canvas.height * row) / rows;
      context.moveTo(0, y);
      context.lineTo(canvas.width, y);
    }
    context.stroke();
  }
  context.restore();
}

function drawShape(context, canvas, { label, points }, color) {
  const place = ([x, y]) => [
    (Math.min(1000, Math.max(0, x)) / 1000) * canvas.width,
    (Math.min(1000, Math.max(0, y)) / 1000) * canvas.height,
  ];
  const placed = points.map(place);
  context.save();
  context.lineWidth = Math.max(2, canvas.width / 250);
  context.strokeStyle = color;
  context.beginPath();
  placed.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
  context.stroke();
  if (label) {
    context.font = `600 ${Math.max(12, Math.round(canvas.width / 45))}px system-ui, sans-serif`;
    const height = parseInt(context.font.split(" ")[1], 10) + 6;
    const width = context.measureText(label).width + 8;
    const x = Math.max(0, Math.min(placed[0][0], canvas.width - width));
    const y = placed[0][1] >= height ? placed[0][1] - height : placed[0][1];
    context.fillStyle = color;
    context.fillRect(x, y, width, height);
    context.fillStyle = "#ffffff";
    context.textBaseline = "middle";
    context.fillText(label, x + 4, y + height / 2);
  }
  context.restore();
}
