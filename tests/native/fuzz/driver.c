/* main() for a fuzz target where the compiler brings no libFuzzer: every file of the corpus
 * as it is, then, for a while, mutations of them drawn from a seed.
 *
 *   fuzz_x [-seconds N] [-seed S] FILE-OR-DIRECTORY...
 *
 * A child does the work, and has its input in memory it shares with us: whatever way it dies,
 * we can still write down what it died of. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
	MAX_LEN = 8192,     /* what mutations grow to */
	MAX_FILE_LEN = 1 << 20,
	MAX_FILES = 1000,
	INPUT_SECONDS = 20, /* nobody takes so long but in a loop */
	MAX_MUTATIONS = 6,
};

struct input {
	uint8_t *data;
	size_t len;
};

static struct input corpus[MAX_FILES];
static size_t corpus_count;

/* What the child works on; it and its parent see the same. */
static struct shared {
	size_t len;
	uint64_t runs;
	int is_done;
	uint8_t data[MAX_FILE_LEN];
} *shared;

static void fail(const char *what)
{
	perror(what);
	exit(2);
}

static void read_file(const char *path)
{
	struct input *input = &corpus[corpus_count];
	FILE *file = fopen(path, "rb");

	if (!file || corpus_count == MAX_FILES)
		fail(path);
	input->data = malloc(MAX_FILE_LEN);
	if (!input->data)
		fail("malloc");
	input->len = fread(input->data, 1, MAX_FILE_LEN, file);
	fclose(file);
	corpus_count++;
}

static int compare(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

/* In the order of their names: what a seed does may not depend on the file system. */
static void read_directory(const char *path)
{
	char *names[MAX_FILES];
	size_t count = 0;
	DIR *directory = opendir(path);
	struct dirent *entry;

	if (!directory)
		fail(path);
	while ((entry = readdir(directory)) && count < MAX_FILES) {
		if (entry->d_name[0] == '.')
			continue;
		if (asprintf(&names[count++], "%s/%s", path, entry->d_name) < 0)
			fail("asprintf");
	}
	closedir(directory);
	qsort(names, count, sizeof(names[0]), compare);
	for (size_t i = 0; i < count; i++) {
		read_file(names[i]);
		free(names[i]);
	}
}

static uint64_t state;

/* xorshift64*, Vigna 2016. */
static uint32_t draw(uint32_t below)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (uint32_t)((state * 0x2545f4914f6cdd1du) >> 32) % below;
}

static uint32_t draw_offset(size_t len)
{
	/* Half the time near the beginning: headers are where it matters. */
	return draw((uint32_t)(len > 64 && draw(2) ? 64 : len));
}

static void set16(struct shared *input, uint16_t value)
{
	const size_t at = draw_offset(input->len);

	input->data[at] = (uint8_t)(value >> 8);
	if (at + 1 < input->len)
		input->data[at + 1] = (uint8_t)value;
}

static void truncate_input(struct shared *input)
{
	input->len = draw((uint32_t)input->len + 1);
}

static void splice(struct shared *input)
{
	const struct input *other = &corpus[draw((uint32_t)corpus_count)];
	const size_t at = draw((uint32_t)input->len + 1);
	size_t from, len;

	if (!other->len)
		return;
	from = draw((uint32_t)other->len);
	len = 1 + draw((uint32_t)(other->len - from));
	if (at + len > MAX_LEN)
		return;
	memcpy(input->data + at, other->data + from, len);
	if (at + len > input->len || draw(2))
		input->len = at + len;
}

static void grow(struct shared *input)
{
	const size_t at = draw((uint32_t)input->len + 1), from = draw((uint32_t)input->len + 1);
	size_t len = 1 + draw(64);

	/* Bytes of its own, once more: records and options repeat. */
	if (len > input->len - from)
		len = input->len - from;
	if (input->len + len > MAX_LEN)
		return;
	memmove(input->data + at + len, input->data + at, input->len - at);
	memmove(input->data + at, input->data + (from < at ? from : from + len), len);
	input->len += len;
}

static void mutate(struct shared *input)
{
	static const uint16_t interesting[] = {
		0,    1,      2,      4,      8,      19,     20,     21,     27,     28,
		40,   60,     64,     68,     120,    0x7f,   0x80,   0xff,   0x100,  576,
		1000, 1472,   1500,   4095,   4096,   0x1fff, 0x2000, 0x4000, 0x3fff, 0x7fff,
		8191, 0x8000, 0x8001, 0xfff7, 0xfff8, 0xfffe, 0xffff, 65507,  65515,  0x4500,
	};
	const uint32_t count = sizeof(interesting) / sizeof(interesting[0]);
	size_t at;

	if (!input->len) {
		input->data[0] = (uint8_t)draw(256);
		input->len = 1;
	}
	at = draw_offset(input->len);
	switch (draw(8)) {
	case 0:
	case 1:
		input->data[at] ^= (uint8_t)(1u << draw(8));
		break;
	case 2:
		input->data[at] = (uint8_t)draw(256);
		break;
	case 3:
		input->data[at] = (uint8_t)(input->data[at] + draw(9) - 4);
		break;
	case 4:
		set16(input, interesting[draw(count)]);
		break;
	case 5:
		truncate_input(input);
		break;
	case 6:
		splice(input);
		break;
	default:
		grow(input);
		break;
	}
}

static void run_one(void)
{
	/* Of exactly its size, as libFuzzer gives it. */
	uint8_t *data = malloc(shared->len + !shared->len);

	if (!data)
		fail("malloc");
	memcpy(data, shared->data, shared->len);
	alarm(INPUT_SECONDS);
	(void)LLVMFuzzerTestOneInput(data, shared->len);
	alarm(0);
	shared->runs++;
	free(data);
}

static void load(const struct input *input)
{
	memcpy(shared->data, input->data, input->len);
	shared->len = input->len;
}

static double now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void work(double seconds, uint64_t seed)
{
	const double until = now_s() + seconds;

	for (size_t i = 0; i < corpus_count; i++) {
		load(&corpus[i]);
		run_one();
	}
	state = seed * 0x9e3779b97f4a7c15u + 1;
	while (corpus_count && now_s() < until) {
		const struct input *input = &corpus[draw((uint32_t)corpus_count)];

		load(input);
		if (shared->len > MAX_LEN)
			shared->len = MAX_LEN;
		for (uint32_t left = 1 + draw(MAX_MUTATIONS); left > 0; left--)
			mutate(shared);
		run_one();
	}
	shared->is_done = 1;
}

static void save(const char *target)
{
	char path[256];
	FILE *file;

	snprintf(path, sizeof(path), "crash-%s-%ld", target, (long)getpid());
	file = fopen(path, "wb");
	if (!file || fwrite(shared->data, 1, shared->len, file) != shared->len || fclose(file))
		fail(path);
	fprintf(stderr, "%s: input %" PRIu64 " is in %s\n", target, shared->runs + 1, path);
}

int main(int argc, char **argv)
{
	const char *target = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
	double seconds = 0;
	uint64_t seed = 1;
	int status;
	pid_t child;

	for (int i = 1; i < argc; i++) {
		struct stat info;

		if (!strcmp(argv[i], "-seconds") && i + 1 < argc) {
			seconds = strtod(argv[++i], NULL);
		} else if (!strcmp(argv[i], "-seed") && i + 1 < argc) {
			seed = strtoull(argv[++i], NULL, 0);
		} else {
			if (stat(argv[i], &info))
				fail(argv[i]);
			if (S_ISDIR(info.st_mode))
				read_directory(argv[i]);
			else
				read_file(argv[i]);
		}
	}
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	if (shared == MAP_FAILED)
		fail("mmap");
	fflush(NULL);
	child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		work(seconds, seed);
		for (size_t i = 0; i < corpus_count; i++)
			free(corpus[i].data);
		return 0; /* through exit: leaks are looked for there */
	}
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	if (status) {
		if (WIFSIGNALED(status))
			fprintf(stderr, "%s: %s\n", target,
				WTERMSIG(status) == SIGALRM ? "hangs" : strsignal(WTERMSIG(status)));
		if (shared->is_done)
			fprintf(stderr, "%s: after the last input\n", target);
		else
			save(target);
		return 1;
	}
	printf("%s: %zu inputs, %" PRIu64 " runs, seed %" PRIu64 "\n", target, corpus_count,
	       shared->runs, seed);
	return 0;
}
