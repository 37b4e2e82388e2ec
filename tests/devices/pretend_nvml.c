/* A pretend libnvidia-ml.so.1: the cards that TARS is made for, for the real pynvml to read on a machine without any.
 *
 * Law of this file: it answers as NVML does (init counting, versioned structs, buffer lengths, error codes), and knows nothing of TARS.
 * TARS_PRETEND_NVML chooses the scenario. TARS_PRETEND_NVML_CONTROL names a file that tests write while the library runs; its lines:
 *     lost INDEX            this card falls off the bus
 *     used INDEX MIB        so much of its memory is taken by others
 *     uninitialised         the driver was reloaded: every answer is UNINITIALIZED until the next init
 *     gone                  the driver was unloaded: init answers DRIVER_NOT_LOADED
 * Compiled with -DOLD_DRIVER it lacks the functions that drivers before 510 lack.
 * Prior art: NVIDIA/k8s-test-infra, mocknvml. Layouts and codes: nvml.h, as pynvml has them.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999
};

#define MIB (1024ULL * 1024ULL)
#define NOT_AVAILABLE (~0ULL)
#define MEMORY_V2 0x02000028U /* sizeof(nvmlMemory_v2_t) | 2 << 24 */

/* What a card does not answer. */
enum {
    HIDES_MEMORY = 1 << 0,
    HIDES_UTILISATION = 1 << 1,
    HIDES_PROCESS_BYTES = 1 << 2,
    HIDES_POWER = 1 << 3,
    HIDES_TEMPERATURE = 1 << 4,
    HIDES_NAME = 1 << 5,
    HIDES_UUID = 1 << 6,
    HIDES_CAPABILITY = 1 << 7,
    HIDES_PCI = 1 << 8,
    HIDES_PROCESSES = 1 << 9,
    MEMORY_BROKEN = 1 << 10,
    HIDES_ALL = (1 << 10) - 1
};

typedef struct {
    const char *name;
    const char *uuid;
    int major, minor;
    unsigned long long total_mib, reserved_mib, used_mib;
    unsigned celsius, utilisation, milliwatts, bus;
    unsigned hides;
} Card;

static const Card RTX_3060 = {"NVIDIA GeForce RTX 3060", "GPU-30600000-0000-4000-8000-000000000001", 8, 6,
                              12288, 379, 300, 41, 7, 15250, 0x01, 0};
static const Card GTX_1660S = {"NVIDIA GeForce GTX 1660 SUPER", "GPU-16600000-0000-4000-8000-000000000002", 7, 5,
                               6144, 213, 150, 38, 0, 9100, 0x02, 0};
static const Card RTX_4090_WSL2 = {"NVIDIA GeForce RTX 4090", "GPU-40900000-0000-4000-8000-000000000003", 8, 9,
                                   24564, 484, 1500, 45, 0, 21000, 0x01, HIDES_PROCESS_BYTES | HIDES_UTILISATION};
static const Card GB10 = {"NVIDIA GB10", "GPU-10100000-0000-4000-8000-000000000004", 12, 1,
                          0, 0, 0, 36, 3, 4400, 0x0f, HIDES_MEMORY};
static const Card UNIFIED_ZERO = {"Orin (nvgpu)", "GPU-0a100000-0000-4000-8000-000000000005", 8, 7,
                                  0, 0, 0, 36, 0, 4400, 0x00, HIDES_POWER};
static const Card MUTE = {"", "", 0, 0, 0, 0, 0, 0, 0, 0, 0, (HIDES_ALL & ~HIDES_MEMORY) | MEMORY_BROKEN};

typedef struct {
    const char *name;
    const char *driver;
    int init;
    unsigned count;
    const Card *cards[4];
} Scenario;

static const Scenario SCENARIOS[] = {
    {"rtx3060", "550.144.03", SUCCESS, 1, {&RTX_3060}},
    {"gtx1660s", "535.183.01", SUCCESS, 1, {&GTX_1660S}},
    {"rtx4090-wsl2", "566.36", SUCCESS, 1, {&RTX_4090_WSL2}},
    {"unified", "580.95.05", SUCCESS, 1, {&GB10}},
    {"unified-zero", "540.4.0", SUCCESS, 1, {&UNIFIED_ZERO}},
    {"two-cards", "550.144.03", SUCCESS, 2, {&RTX_3060, &GTX_1660S}},
    {"mute", "550.144.03", SUCCESS, 1, {&MUTE}},
    {"no-cards", "550.144.03", SUCCESS, 0, {NULL}},
    {"driver-not-loaded", "", DRIVER_NOT_LOADED, 0, {NULL}},
    {"version-mismatch", "", LIB_RM_VERSION_MISMATCH, 0, {NULL}},
};

static int users = 0;
static int reloaded = 0; /* a reload was already answered with UNINITIALIZED and then with a new init */

static const Scenario *scenario(void) {
    const char *wanted = getenv("TARS_PRETEND_NVML");
    for (size_t index = 0; wanted && index < sizeof SCENARIOS / sizeof *SCENARIOS; index++)
        if (strcmp(wanted, SCENARIOS[index].name) == 0) return &SCENARIOS[index];
    fprintf(stderr, "pretend_nvml: TARS_PRETEND_NVML names no scenario: %s\n", wanted ? wanted : "(unset)");
    abort();
}

/* Whether the control file has a line `word` (index < 0) or `word index [value]`. */
static int controlled(const char *word, int index, unsigned long long *value) {
    const char *path = getenv("TARS_PRETEND_NVML_CONTROL");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[128], found[64];
    int yes = 0;
    if (!file) return 0;
    while (fgets(line, sizeof line, file)) {
        int number = -1;
        unsigned long long amount = 0;
        int fields = sscanf(line, "%63s %d %llu", found, &number, &amount);
        if (fields < 1 || strcmp(found, word) != 0 || (index >= 0 && number != index)) continue;
        yes = 1;
        if (value) *value = amount;
    }
    fclose(file);
    return yes;
}

static int library_state(void) {
    if (users == 0) return UNINITIALIZED;
    if (controlled("gone", -1, NULL)) return UNINITIALIZED;
    if (controlled("uninitialised", -1, NULL) && !reloaded) return UNINITIALIZED;
    return SUCCESS;
}

static int card_state(const Card **card) {
    int state = library_state();
    if (state != SUCCESS) return state;
    const Scenario *now = scenario();
    for (unsigned index = 0; index < now->count; index++)
        if (now->cards[index] == *card) return controlled("lost", (int)index, NULL) ? GPU_IS_LOST : SUCCESS;
    return INVALID_ARGUMENT;
}

static unsigned index_of(const Card *card) {
    const Scenario *now = scenario();
    for (unsigned index = 0; index < now->count; index++)
        if (now->cards[index] == card) return index;
    abort();
}

#define ANSWERS(card, hidden)                                \
    do {                                                     \
        int state_ = card_state(&(card));                    \
        if (state_ != SUCCESS) return state_;                \
        if ((card)->hides & (hidden)) return NOT_SUPPORTED;  \
    } while (0)

static int write_text(char *buffer, unsigned length, const char *text) {
    if (strlen(text) + 1 > length) return INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return SUCCESS;
}

/* --- library and system -------------------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (controlled("gone", -1, NULL)) return DRIVER_NOT_LOADED;
    if (scenario()->init != SUCCESS) return scenario()->init;
    if (controlled("uninitialised", -1, NULL)) reloaded = 1;
    users++;
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (users == 0) return UNINITIALIZED;
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int result) { return result == SUCCESS ? "Success" : "an NVML error"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    int state = library_state();
    return state != SUCCESS ? state : write_text(version, length, scenario()->driver);
}

int nvmlSystemGetNVMLVersion(char *version, unsigned length) { return write_text(version, length, "12.550.144.03"); }

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 12040;
    return SUCCESS;
}

/* --- cards ----------------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetCount_v2(unsigned *count) {
    int state = library_state();
    if (state == SUCCESS) *count = scenario()->count;
    return state;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const Card **card) {
    int state = library_state();
    if (state != SUCCESS) return state;
    if (index >= scenario()->count) return INVALID_ARGUMENT;
    *card = scenario()->cards[index];
    return card_state(card);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, const Card **card) {
    int state = library_state();
    if (state != SUCCESS) return state;
    for (unsigned index = 0; index < scenario()->count; index++)
        if (strcmp(scenario()->cards[index]->uuid, uuid) == 0) {
            *card = scenario()->cards[index];
            return card_state(card);
        }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(const Card *card, unsigned *index) {
    ANSWERS(card, 0);
    *index = index_of(card);
    return SUCCESS;
}

int nvmlDeviceGetName(const Card *card, char *name, unsigned length) {
    ANSWERS(card, HIDES_NAME);
    return write_text(name, length, card->name);
}

int nvmlDeviceGetUUID(const Card *card, char *uuid, unsigned length) {
    ANSWERS(card, HIDES_UUID);
    return write_text(uuid, length, card->uuid);
}

int nvmlDeviceGetCudaComputeCapability(const Card *card, int *major, int *minor) {
    ANSWERS(card, HIDES_CAPABILITY);
    *major = card->major;
    *minor = card->minor;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(const Card *card, int sensor, unsigned *celsius) {
    ANSWERS(card, HIDES_TEMPERATURE);
    if (sensor != 0) return INVALID_ARGUMENT;
    *celsius = card->celsius;
    return SUCCESS;
}

typedef struct {
    unsigned gpu, memory;
} Utilisation;

int nvmlDeviceGetUtilizationRates(const Card *card, Utilisation *utilisation) {
    ANSWERS(card, HIDES_UTILISATION);
    utilisation->gpu = card->utilisation;
    utilisation->memory = 1;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(const Card *card, unsigned *milliwatts) {
    ANSWERS(card, HIDES_POWER);
    *milliwatts = card->milliwatts;
    return SUCCESS;
}

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} PciInfo;

int nvmlDeviceGetPciInfo_v3(const Card *card, PciInfo *info) {
    ANSWERS(card, HIDES_PCI);
    memset(info, 0, sizeof *info);
    info->bus = card->bus;
    snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "0000:%02X:00.0", card->bus);
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", card->bus);
    return SUCCESS;
}

/* --- memory ------------------------------------------------------------------------------------------------------------ */

static unsigned long long used_mib(const Card *card) {
    unsigned long long used = card->used_mib;
    controlled("used", (int)index_of(card), &used);
    return used;
}

typedef struct {
    unsigned long long total, free, used;
} Memory;

/* The first version counts the driver's own part as used. */
int nvmlDeviceGetMemoryInfo(const Card *card, Memory *memory) {
    ANSWERS(card, HIDES_MEMORY);
    if (card->hides & MEMORY_BROKEN) return UNKNOWN;
    memory->total = card->total_mib * MIB;
    memory->used = (card->total_mib ? used_mib(card) + card->reserved_mib : 0) * MIB;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} MemoryV2;

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} Process;

static int list_processes(const Card *card, unsigned *count, Process *processes) {
    ANSWERS(card, HIDES_PROCESSES);
    unsigned room = *count;
    *count = 1;
    if (room < 1 || !processes) return INSUFFICIENT_SIZE;
    memset(processes, 0, sizeof *processes);
    processes[0].pid = 4242;
    processes[0].used = card->hides & HIDES_PROCESS_BYTES ? NOT_AVAILABLE : 128 * MIB;
    processes[0].gpu_instance = processes[0].compute_instance = ~0U;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(const Card *card, unsigned *count, Process *processes) {
    return list_processes(card, count, processes);
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(const Card *card, MemoryV2 *memory) {
    ANSWERS(card, HIDES_MEMORY);
    if (memory->version != MEMORY_V2) return ARGUMENT_VERSION_MISMATCH;
    if (card->hides & MEMORY_BROKEN) return UNKNOWN;
    memory->total = card->total_mib * MIB;
    memory->reserved = card->reserved_mib * MIB;
    memory->used = (card->total_mib ? used_mib(card) : 0) * MIB;
    memory->free = memory->total - memory->reserved - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const Card *card, unsigned *count, Process *processes) {
    return list_processes(card, count, processes);
}
#endif
