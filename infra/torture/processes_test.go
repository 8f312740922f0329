//go:build torture && linux

package torture_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"wharf/infra/embedded"
	"wharf/infra/embedded/apache"
)

const (
	stopTimeout  = time.Minute            // of a process that was told to end
	startTimeout = 3 * time.Minute        // of one that was started, until it is ready
	restartPause = 500 * time.Millisecond // before a process that ended by itself is started anew
	lookAgain    = 50 * time.Millisecond
)

// victim is a process that can be tortured.
type victim struct {
	name, kind string
	start      func(context.Context) error // returns before it is ready
	ready      func(context.Context) error // nil when it is, now
	kill       func() error                // with -9, and waits for the end
	stop       func() error                // in order; an error if that does not go well
	pause      func()
	resume     func()
}

// ports are handed out once. They are not of the range that the system gives to outgoing connections: one of those could
// hold the port of a process that is to start again.
type ports struct{ used map[int]bool }

func (p *ports) next() (int, error) {
	for range 1000 {
		port := 10000 + rand.IntN(10000)
		if p.used[port] {
			continue
		}
		l, err := net.Listen("tcp", addr(port))
		if err != nil {
			continue
		}
		p.used[port] = true
		return port, l.Close()
	}
	return 0, errors.New("no port is free")
}

func addr(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// process is a program that is started again when it ends by itself, as its container would be.
type process struct {
	name    string
	program string
	args    []string
	env     []string
	log     string // file
	ended   func(name, how string)

	mu     sync.Mutex
	cmd    *exec.Cmd     // nil: none runs
	exited chan struct{} // closed when cmd has ended
	wanted bool
}

func (p *process) start(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wanted = true
	return p.launch()
}

func (p *process) launch() error {
	if p.cmd != nil || !p.wanted {
		return nil
	}
	output, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer output.Close()
	cmd := exec.Command(p.program, p.args...)
	cmd.Env = append(os.Environ(), p.env...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = attributes()
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	p.cmd, p.exited = cmd, exited
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.cmd = nil
		close(exited)
		alone := p.wanted
		p.mu.Unlock()
		if !alone {
			return
		}
		p.ended(p.name, fmt.Sprintf("%v: %s", err, lastLine(p.log)))
		time.Sleep(restartPause)
		p.mu.Lock()
		defer p.mu.Unlock()
		if err := p.launch(); err != nil {
			p.ended(p.name, err.Error())
		}
	}()
	return nil
}

// attributes keep a process out of reach of the terminal's Ctrl-C, and end it when this one ends, however it does.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// signal sends the signal, and returns what ends when the process does.
func (p *process) signal(s syscall.Signal, wanted bool) (*exec.Cmd, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wanted = wanted
	if p.cmd == nil {
		done := make(chan struct{})
		close(done)
		return nil, done
	}
	_ = p.cmd.Process.Signal(s) // it may have ended
	return p.cmd, p.exited
}

func (p *process) kill() error {
	_, exited := p.signal(syscall.SIGKILL, false)
	<-exited
	return nil
}

func (p *process) stop() error {
	cmd, exited := p.signal(syscall.SIGTERM, false)
	select {
	case <-exited:
	case <-time.After(stopTimeout):
		_, exited = p.signal(syscall.SIGQUIT, false) // which tells where it stands
		<-exited
		return fmt.Errorf("%s did not stop in %s", p.name, stopTimeout)
	}
	if cmd != nil && cmd.ProcessState.ExitCode() != 0 {
		return fmt.Errorf("%s stopped with %s: %s", p.name, cmd.ProcessState, lastLine(p.log))
	}
	return nil
}

func (p *process) pause()  { p.signal(syscall.SIGSTOP, true) }
func (p *process) resume() { p.signal(syscall.SIGCONT, true) }

func (p *process) victim(kind string, ready func(context.Context) error) *victim {
	return &victim{name: p.name, kind: kind, start: p.start, ready: ready, kill: p.kill, stop: p.stop,
		pause: p.pause, resume: p.resume}
}

func lastLine(file string) string {
	data, _ := os.ReadFile(file)
	data = bytes.TrimSpace(data)
	return string(data[bytes.LastIndexByte(data, '\n')+1:])
}

// readyz asks a program whether it is ready.
func readyz(url string) func(context.Context) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	}
}

// await returns when the victim is ready.
func (v *victim) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := v.ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(lookAgain):
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %s: %w", v.name, startTimeout, err)
		}
	}
}

// postgres is a server with all its sessions.
func postgres(ctx context.Context, dir string, port int) (*victim, string, error) {
	start := func(ctx context.Context) (*embedded.Postgres, error) {
		ctx, cancel := context.WithTimeout(ctx, startTimeout)
		defer cancel()
		return embedded.StartPostgres(ctx, dir, slog.New(slog.DiscardHandler), embedded.Port(port))
	}
	server, err := start(ctx)
	if err != nil {
		return nil, "", err
	}
	signal := func(s syscall.Signal) {
		for _, pid := range family(server.PID()) {
			_ = syscall.Kill(pid, s)
		}
	}
	return &victim{
		name: "postgres", kind: "postgres",
		start: func(ctx context.Context) (err error) {
			select {
			case <-server.Done():
				server, err = start(ctx)
			default: // the first start
			}
			return err
		},
		ready: func(context.Context) error { return nil },
		kill: func() error {
			// All at once, as if the machine had failed: left to itself a session may finish what it is at.
			signal(syscall.SIGSTOP)
			signal(syscall.SIGKILL)
			<-server.Done()
			return nil
		},
		stop:   func() error { return server.Stop() },
		pause:  func() { signal(syscall.SIGSTOP) },
		resume: func() { signal(syscall.SIGCONT) },
	}, server.URL(), nil
}

// family is the process and its children.
func family(pid int) []int {
	all := []int{pid}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may hold anything; the state and the parent follow it.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[1] == strconv.Itoa(pid) {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			all = append(all, child)
		}
	}
	return all
}

// broker is Apache Kafka, or the embedded broker in a process of its own where Java or Maven is missing.
func broker(ctx context.Context, which, dir string, port int, ended func(name, how string)) (v *victim, name, at string, err error) {
	if which != "embedded" {
		cluster, err := apache.Start(ctx, filepath.Join(dir, "kafka"), 1)
		switch {
		case err == nil:
			b := cluster.Brokers()[0]
			return &victim{
				name: "kafka", kind: "kafka", start: b.Start,
				ready:  func(context.Context) error { return nil },
				kill:   func() error { b.Kill(); return nil },
				stop:   func() error { b.Stop(); return nil },
				pause:  b.Pause,
				resume: b.Resume,
			}, "Apache Kafka", b.Addr, nil
		case which != "" || !errors.Is(err, apache.ErrMissing):
			return nil, "", "", err
		}
	}
	// The broker takes the port that its state names.
	home := filepath.Join(dir, "broker", "kafka")
	state, _ := json.Marshal(map[string]any{"port": port, "inOrder": true})
	if err := errors.Join(os.MkdirAll(home, 0o755), os.WriteFile(filepath.Join(home, "broker.json"), state, 0o600)); err != nil {
		return nil, "", "", err
	}
	p := &process{name: "kafka", program: os.Args[0], env: []string{brokerVariable + "=" + filepath.Dir(home)},
		log: filepath.Join(dir, "kafka.log"), ended: ended}
	v = p.victim("kafka", func(ctx context.Context) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", addr(port))
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return v, "the embedded broker", addr(port), errors.Join(p.start(ctx), v.await(ctx))
}

// brokerVariable makes the test's binary an embedded broker on the data directory that is its value.
const brokerVariable = "WHARF_TORTURE_BROKER"

func runBroker(ctx context.Context, dir string) error {
	owner, err := embedded.Lock(dir)
	if err != nil {
		return err
	}
	b, err := embedded.StartBroker(ctx, dir, slog.Default())
	if err != nil {
		return err
	}
	<-ctx.Done()
	return errors.Join(b.Close(), owner.Release())
}

// suspicious are the words that no program may say.
var suspicious = []string{"panic", "DATA RACE", "data race", "DATA LOSS", "data loss", "quarantine", "halted", "fatal error"}

// complaints are the lines of the programs' logs that hold such a word.
func complaints(dir string) (found []string, err error) {
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Dir(name) != dir || filepath.Ext(name) != ".log" {
			return err
		}
		data, err := os.ReadFile(name)
		for line := range strings.Lines(string(data)) {
			for _, word := range suspicious {
				if strings.Contains(line, word) {
					found = append(found, filepath.Base(name)+": "+strings.TrimSpace(line))
					break
				}
			}
		}
		return err
	})
	return found, err
}
