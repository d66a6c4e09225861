package main

import (
	"fmt"
	"math"
	"os"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

type out map[string]any

// status reads a number from /proc/PID/status, or from a task's of it.
func status(path, name string) int64 {
	b, _ := os.ReadFile(path)
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name+":" {
			v, _ := strconv.ParseInt(f[1], 10, 64)
			return v
		}
	}
	return 0
}

// maxRSS is the most memory that an ended process had, in KiB.
func maxRSS(p *os.ProcessState) int64 { return p.SysUsage().(*syscall.Rusage).Maxrss }

func rssKiB(pid int) int64 { return status(fmt.Sprintf("/proc/%d/status", pid), "VmRSS") }

// switches is how often the threads of a process went to sleep, which is how often they were woken.
func switches(pid int) (n int64) {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, t := range tasks {
		n += status(fmt.Sprintf("/proc/%d/task/%s/status", pid, t.Name()), "voluntary_ctxt_switches")
	}
	return n
}

// cpu is the processor time of a whole process in seconds, to the nanosecond: its CPU-time clock (clock_getcpuclockid).
func cpu(pid int) float64 {
	const CPUCLOCK_SCHED = 2
	var ts syscall.Timespec
	id := uintptr(^uint32(pid)<<3 | CPUCLOCK_SCHED)
	if pid == 0 {
		return 0
	}
	if _, _, e := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, uintptr(int32(id)), uintptr(unsafe.Pointer(&ts)), 0); e != 0 {
		return math.NaN()
	}
	return float64(ts.Sec) + float64(ts.Nsec)/1e9
}

// meter takes wall-clock time and processor time of both sides.
type meter struct {
	t        time.Time
	cli, srv float64
}

func startMeter() meter { return meter{time.Now(), cpu(os.Getpid()), cpu(*fPID)} }

func (m meter) stop(o out) out {
	o["wall_s"] = round(time.Since(m.t).Seconds())
	o["client_cpu_s"] = round(cpu(os.Getpid()) - m.cli)
	o["server_cpu_s"] = round(cpu(*fPID) - m.srv)
	return o
}

// per gives a measured figure for each of n, in millionths.
func (o out) per(name string, n int) float64 { return round(o[name].(float64) / float64(n) * 1e6) }

func round(v float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 5, 64), 64)
	if err != nil || math.IsNaN(r) || math.IsInf(r, 0) {
		return 0
	}
	return r
}

// quantiles adds median, 99th percentile and minimum.
func quantiles(o out, name string, d []float64) {
	sort.Float64s(d)
	for suffix, q := range map[string]float64{"_p50": .5, "_p99": .99, "_min": 0} {
		o[name+suffix] = round(d[int(q*float64(len(d)-1))])
	}
}
