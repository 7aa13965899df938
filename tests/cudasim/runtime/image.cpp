// SPDX-License-Identifier: Apache-2.0
#include "runtime/image.h"

#include <cxxabi.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>

// How the dynamic linker finds a thread-local variable; it makes the segment on the first call.
struct TlsIndex {
  unsigned long module, offset;
};
extern "C" void* __tls_get_addr(TlsIndex*);

namespace cudasim {
namespace {

struct Image {
  uintptr_t base = 0;
  std::string path;
  std::vector<Segment> data;
  Segment shared;
};

Image image;

int visit(dl_phdr_info* info, size_t, void* code) {
  Image found;
  found.base = info->dlpi_addr;
  found.path = info->dlpi_name;
  bool holds_code = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    const Segment segment{info->dlpi_addr + header.p_vaddr, header.p_memsz};
    if (header.p_type == PT_LOAD) {
      found.data.push_back(segment);
      holds_code |= reinterpret_cast<uintptr_t>(code) - segment.begin < segment.bytes;
    } else if (header.p_type == PT_TLS) {
      found.shared.bytes = segment.bytes;
    }
  }
  if (!holds_code) return 0;
  if (found.shared.bytes) {
    TlsIndex index{info->dlpi_tls_modid, 0};
    found.shared.begin = reinterpret_cast<uintptr_t>(__tls_get_addr(&index));
  }
  image = found;
  return 1;
}

std::string demangled(const char* symbol) {
  int status;
  char* const name = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string result = name ? name : symbol;
  std::free(name);
  return result;
}

// The thread-local symbols of an ELF file; `begin` is the offset in the segment.
std::vector<SharedArray> read_shared_arrays(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  if (file.size() < sizeof(ElfW(Ehdr))) throw std::runtime_error("cudasim: cannot read " + path);
  const auto& header = *reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* const sections = reinterpret_cast<const ElfW(Shdr)*>(&file[header.e_shoff]);
  std::vector<SharedArray> arrays;
  for (int i = 0; i < header.e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* const symbols = reinterpret_cast<const ElfW(Sym)*>(&file[sections[i].sh_offset]);
    const char* const names = &file[sections[sections[i].sh_link].sh_offset];
    for (size_t k = 0; k < sections[i].sh_size / sizeof *symbols; ++k) {
      if (ELF64_ST_TYPE(symbols[k].st_info) != STT_TLS || !symbols[k].st_size) continue;
      const std::string name = demangled(names + symbols[k].st_name);
      const size_t scope = name.rfind("::");
      arrays.push_back({scope == name.npos ? name : name.substr(scope + 2), symbols[k].st_value,
                        symbols[k].st_size, name.rfind("guard variable", 0) == 0});
    }
  }
  return arrays;
}

bool is_own_code(const std::string& path) {
  for (const char* folder : {"/include/", "tests/cudasim/cudasim.h", "_functions.h", "??"}) {
    if (path.find(folder) != path.npos) return false;
  }
  return true;
}

}  // namespace

void select_image(const void* code) {
  image = {};
  dl_iterate_phdr(visit, const_cast<void*>(code));
}

Segment shared_segment() { return image.shared; }

std::vector<SharedArray> shared_arrays() {
  static std::map<std::string, std::vector<SharedArray>> known;
  const auto [entry, is_new] = known.try_emplace(image.path);
  if (is_new) entry->second = read_shared_arrays(image.path);
  std::vector<SharedArray> arrays = entry->second;
  for (SharedArray& array : arrays) array.begin += image.shared.begin;
  return arrays;
}

bool is_image_data(uintptr_t address) {
  for (const Segment& segment : image.data) {
    if (address - segment.begin < segment.bytes) return true;
  }
  return false;
}

uint32_t image_offset(const void* pc) {
  return uint32_t(reinterpret_cast<uintptr_t>(pc) - image.base);
}

std::string source_line(uint32_t offset) {
  char address[16];
  std::snprintf(address, sizeof address, "0x%x", offset - 1);
  const std::string command = "addr2line -i -e '" + image.path + "' " + address + " 2>/dev/null";
  std::string place;
  if (FILE* const lines = popen(command.c_str(), "r")) {
    char text[4096];
    while (std::fgets(text, sizeof text, lines)) {
      const std::string line(text, std::string(text).find_first_of(" \n"));
      if (place.empty() && is_own_code(line)) place = line.substr(line.rfind('/') + 1);
    }
    pclose(lines);
  }
  return place.empty() ? "offset " + std::string(address) : place;
}

}  // namespace cudasim
