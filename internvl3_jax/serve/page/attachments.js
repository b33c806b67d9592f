// Files of the next question: read, shown, and written as parts of a message.

import { draw } from "./drawing.js";

const LIMIT = 20;

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

export class Attachments {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.items = [];
  }

  async add(files) {
    for (const file of files) {
      if (this.items.length >= LIMIT) throw new Error(`at most ${LIMIT} files are sent at once`);
      const item = { name: file.name || "image", url: await dataUrl(file), kind: kindOf(file) };
      if (item.kind === "image") {
        try {
          item.bitmap = await createImageBitmap(file);
        } catch {
          throw new Error(`${item.name} is not an image that this browser can open`);
        }
      }
      this.items.push(item);
    }
    this.show(null);
    this.changed();
  }

  // Takes all files away and returns them.
  take() {
    const items = this.items;
    this.items = [];
    this.show(null);
    return items;
  }

  // grids: of the images, in their order; null until the server has counted them.
  show(grids) {
    let image = 0;
    this.element.replaceChildren(
      ...this.items.map((item, index) => {
        const box = document.createElement("div");
        box.className = "attachment";
        if (item.bitmap) {
          const canvas = document.createElement("canvas");
          draw(canvas, item.bitmap, { tiles: grids?.[image++] ?? null, longest: 400 });
          box.append(canvas);
        }
        const name = document.createElement("div");
        name.className = "name";
        name.textContent = item.name;
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "x";
        remove.title = `Remove ${item.name}`;
        remove.onclick = () => {
          this.items.splice(index, 1);
          this.show(null);
          this.changed();
        };
        box.append(name, remove);
        return box;
      }),
    );
  }
}

function kindOf(file) {
  if (file.type.startsWith("video/")) return "video";
  if (file.type === "application/pdf" || file.name?.toLowerCase().endsWith(".pdf")) return "pdf";
  return "image";
}

// The content of a message: one part per file, then the text.
export function contentOf(items, text) {
  const parts = items.map((item) => {
    if (item.kind === "video") return { type: "video_url", video_url: { url: item.url } };
    if (item.kind === "pdf") {
      return { type: "file", file: { filename: item.name, file_data: item.url } };
    }
    return { type: "image_url", image_url: { url: item.url } };
  });
  return parts.length ? [...parts, { type: "text", text }] : text;
}
