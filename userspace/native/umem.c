// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "umem.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HUGE_PAGE (2U << 20)

int sl_umem_create(uint64_t size, int huge)
{
	int fd, error;

	fd = memfd_create("sluice-umem",
			  MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0));
	if (fd < 0)
		return -errno;
	if (ftruncate(fd, size) || fallocate(fd, 0, 0, size) ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
		error = -errno;
		close(fd);
		return error;
	}
	return fd;
}

/* Whether size bytes of it can be mapped without harm: 0 or -errno. */
static int check(int fd, uint64_t size)
{
	struct stat stat;
	int seals;

	seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0)
		return -errno;
	if (!(seals & F_SEAL_SHRINK))
		return -EPERM;
	if (fstat(fd, &stat))
		return -errno;
	if (size == 0 || (uint64_t)stat.st_size < size)
		return -EINVAL;
	return 0;
}

int sl_umem_map_with(int fd, uint64_t size, uint64_t more, uint8_t **area, uint64_t *at)
{
	uint64_t whole = (size + HUGE_PAGE - 1) & ~(uint64_t)(HUGE_PAGE - 1), before;
	uint8_t *base;
	int error;

	*at = size;
	if (!more)
		return sl_umem_map(fd, size, area);
	error = check(fd, size);
	if (error)
		return error;
	/* A huge page more than needed, so that a boundary of one is within. */
	base = mmap(NULL, whole + more + HUGE_PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return -errno;
	before = -(uintptr_t)base & (HUGE_PAGE - 1);
	if (before)
		munmap(base, before);
	base += before;
	munmap(base + whole + more, HUGE_PAGE - before);
	if (mmap(base, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE | MAP_FIXED, fd,
		 0) == MAP_FAILED) {
		error = -errno;
		munmap(base, whole + more);
		return error;
	}
	*area = base;
	*at = whole;
	return 0;
}

int sl_umem_map(int fd, uint64_t size, uint8_t **area)
{
	int error = check(fd, size);
	void *base;

	if (error)
		return error;
	base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (base == MAP_FAILED)
		return -errno;
	*area = base;
	return 0;
}

void sl_umem_unmap(uint8_t *area, uint64_t size)
{
	uint64_t whole = (size + HUGE_PAGE - 1) & ~(uint64_t)(HUGE_PAGE - 1);

	/* Mappings of huge pages come off only as a whole; others are refused nothing. */
	if (munmap(area, size) && errno == EINVAL)
		munmap(area, whole);
}
