//go:build compose

// Package compose_test answers the question "does the shop in containers survive the loss of any of them?". It needs
// Docker, and runs with `make compose-test`: it builds the image, starts the project under a name of its own, loads it
// through the proxy, scales it, kills its parts in turn under load, audits it, updates its projectors to a release with
// another version of a read model and back, and takes it down.
package compose_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	project = "wharf-test"
	ordersA = "150"  // of the first load
	ordersB = "1500" // of the load under which parts are killed
)

// invoices is the file that WHARF_INVOICES names; without it, orders are made up.
func invoices() []string {
	if file := os.Getenv("WHARF_INVOICES"); file != "" {
		return []string{"--file", file}
	}
	return nil
}

type stack struct {
	t    *testing.T
	port string
	bin  string // wharf, for this machine
}

func (s *stack) compose(args ...string) *exec.Cmd {
	args = append([]string{"compose", "--project-name", project}, args...)
	c := exec.CommandContext(context.WithoutCancel(s.t.Context()), "docker", args...)
	c.Dir = "../.."
	c.Env = append(os.Environ(), "PROXY_PORT="+s.port)
	return c
}

// next is the same with the next release, in which the read model of shipments has another version and one index more.
func (s *stack) next(dir string, args ...string) *exec.Cmd {
	c := s.compose(args...)
	c.Dir = dir
	c.Env = append(c.Env, "WHARF_IMAGE="+nextImage)
	return c
}

const nextImage = "wharf:next"

// nextRelease makes the source of it.
func (s *stack) nextRelease() (dir string) {
	s.t.Helper()
	dir = s.t.TempDir()
	for _, what := range []string{"cmd", "commands", "domain", "infra", "projections"} {
		if err := os.CopyFS(filepath.Join(dir, what), os.DirFS(filepath.Join("../..", what))); err != nil {
			s.t.Fatal(err)
		}
	}
	copied := []string{"go.mod", "go.sum", "Dockerfile", "docker-compose.yml", ".env", ".dockerignore", "projections/shipments.go"}
	for _, file := range copied {
		text, err := os.ReadFile(filepath.Join("../..", file))
		if err == nil && file == "projections/shipments.go" {
			changed := bytes.Replace(text, []byte(`Version: 1,`), []byte(`Version: 2,`), 1)
			changed = bytes.Replace(changed, []byte(`Indexes: []string{`), []byte(`Indexes: []string{"carrier", `), 1)
			if len(changed) != len(text)+len(`"carrier", `) {
				s.t.Fatal("the read model of shipments cannot be changed: it looks otherwise than it did")
			}
			text = changed
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), text, 0o644)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	return dir
}

// awaitVersion waits until that version of the read model is the live one, and up to date.
func (s *stack) awaitVersion(model string, version int) {
	s.t.Helper()
	var said string
	for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		resp, err := http.Get(s.url() + "/projections")
		if err != nil {
			said = err.Error()
			continue
		}
		out, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		said = string(out)
		var status struct {
			Items []struct {
				Name, State string
				Version     int
				Lag         int64
			}
		}
		if err != nil || json.Unmarshal(out, &status) != nil {
			continue
		}
		for _, item := range status.Items {
			if item.Name == model && item.State == "live" && item.Version == version && item.Lag == 0 {
				return
			}
		}
	}
	s.t.Fatalf("version %d of %s is not live and up to date: %s", version, model, said)
}

// up brings everything up, as often as it is said, and waits until all of it is healthy.
func (s *stack) up(scale ...string) *exec.Cmd {
	return s.compose(append([]string{"up", "--detach", "--wait", "--wait-timeout", "300", "--no-recreate"}, scale...)...)
}

// timed runs a command to its end and says how long that took.
func (s *stack) timed(what string, c *exec.Cmd) string {
	s.t.Helper()
	began := time.Now()
	out := s.must(c)
	s.t.Logf("%-40s %6.1f s", what, time.Since(began).Seconds())
	return out
}

// must runs a command to its end and returns what it has printed.
func (s *stack) must(c *exec.Cmd) string {
	s.t.Helper()
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		s.t.Fatalf("%s: %v\n%s%s", c, err, tail(out.String()), tail(errs.String()))
	}
	return strings.TrimSpace(out.String())
}

func tail(s string) string { return s[max(0, len(s)-6000):] }

func (s *stack) wharf(args ...string) *exec.Cmd {
	return exec.CommandContext(s.t.Context(), s.bin, args...)
}

func (s *stack) url() string { return "http://127.0.0.1:" + s.port }

func (s *stack) load(orders string) *exec.Cmd {
	c := s.loadMore(orders)
	c.Args = append(c.Args, invoices()...)
	return c
}

// loadMore has orders made up: those of the file are placed already.
func (s *stack) loadMore(orders string) *exec.Cmd {
	return s.wharf("load", "--url", s.url(), "--orders", orders, "--concurrency", "16", "--read-back", "--json")
}

// delivered checks a load's report. Some made-up orders are cancelled, none of a file.
func (s *stack) delivered(report, orders string, cancels bool) {
	s.t.Helper()
	var r struct{ Placed, Delivered, Cancelled int }
	if err := json.Unmarshal([]byte(report), &r); err != nil {
		s.t.Fatalf("the report %q: %v", report, err)
	}
	s.t.Log(strings.TrimSpace(report))
	if fmt.Sprint(r.Placed) != orders || r.Delivered+r.Cancelled != r.Placed || r.Cancelled > 0 && !cancels {
		s.t.Errorf("of %s orders %d are delivered", orders, r.Delivered)
	}
}

// container is the name of a service's first replica.
func container(service string) string { return project + "-" + service + "-1" }

func (s *stack) inspect(container, format string) string {
	s.t.Helper()
	return s.must(exec.Command("docker", "inspect", "--format", format, container))
}

// crash kills the process of a container, and nobody starts it again: its restart policy has to. (It would not after a
// `docker kill`.) The signal comes from a container that sees all processes, and has a shell.
func (s *stack) crash(service, image string) {
	s.t.Helper()
	pid := s.inspect(container(service), "{{.State.Pid}}")
	s.timed("crash "+service, exec.Command("docker", "run", "--rm", "--pid", "host", "--network", "none", "--user", "0",
		"--entrypoint", "sh", image, "-c", "kill -9 "+pid))
}

// victims are crashed in turn.
var victims = []string{"orders", "kafka", "projector", "postgres", "inventory", "payments"}

func TestTheShopInContainers(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	s := &stack{t: t, port: port, bin: filepath.Join(t.TempDir(), "wharf")}
	s.must(s.compose("down", "--volumes", "--timeout", "5")) // what an interrupted run has left
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := s.compose("logs", "--no-color", "--tail", "60").CombinedOutput()
			t.Logf("the containers say:\n%s", logs)
		}
		s.timed("take it down", s.compose("down", "--volumes", "--timeout", "5"))
	})
	s.timed("build the tool", exec.Command("go", "build", "-o", s.bin, "../../cmd/wharf"))
	s.timed("build the image", s.compose("build", "topics"))
	s.timed("start", s.up())
	s.delivered(s.timed("load "+ordersA+" orders", s.load(ordersA)), ordersA, invoices() == nil)
	scale := []string{"--scale", "orders=3", "--scale", "projector=3"}
	s.timed("scale", s.up(scale...))

	loading := s.load(ordersB)
	var report bytes.Buffer
	loading.Stdout = &report
	progress, err := loading.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := loading.Start(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for scan := bufio.NewScanner(progress); scan.Scan(); {
			lines <- scan.Text()
		}
	}()
	image := s.inspect(container("postgres"), "{{.Config.Image}}")
	left := victims
	for line := range lines {
		t.Log(line)
		// The first is crashed when orders are being placed, each other one when commands have gone on since the last.
		if len(left) > 0 && strings.HasPrefix(line, "placed ") && !strings.HasPrefix(line, "placed 0 ") {
			s.crash(left[0], image)
			left = left[1:]
		}
	}
	if err := loading.Wait(); err != nil {
		t.Fatalf("the load: %v", err)
	}
	t.Logf("%-40s %6.1f s", "load "+ordersB+" orders under crashes", time.Since(began).Seconds())
	if len(left) > 0 {
		t.Errorf("the load had ended before %s were crashed: it was too small", left)
	}
	s.delivered(report.String(), ordersB, invoices() == nil)
	s.timed("wait until all are healthy", s.up(scale...))
	for _, service := range victims {
		if n := s.inspect(container(service), "{{.RestartCount}}"); n == "0" {
			t.Errorf("%s was not started again by its restart policy", service)
		}
	}
	in := func(args ...string) *exec.Cmd {
		return s.compose(append([]string{"exec", "-T", "projector", "wharf"}, args...)...)
	}
	s.timed("replay", in("replay", "--all"))
	s.timed("roll back", in("replay", "--rollback", "orders"))
	t.Log(s.timed("verify", in("verify")))
	t.Log(s.timed("audit", s.wharf("audit", "--url", s.url())))

	// A rolling update: first one projector of the next release beside the old ones, then all; and back again.
	next := s.nextRelease()
	s.timed("build the next release", s.next(next, "build", "topics"))
	beside := []string{"up", "--detach", "--wait", "--wait-timeout", "120", "--no-deps"}
	s.timed("a newer projector comes", s.next(next, append(beside, "--no-recreate", "--scale", "projector=4", "projector")...))
	s.awaitVersion("shipments", 2)
	s.delivered(s.timed("load "+ordersA+" orders meanwhile", s.loadMore(ordersA)), ordersA, true)
	s.timed("all projectors are newer", s.next(next, append(beside, "--scale", "projector=3", "projector")...))
	s.awaitVersion("shipments", 2)
	t.Log(s.timed("verify", in("verify")))
	s.timed("all projectors are older", s.compose(append(beside, "--scale", "projector=3", "projector")...))
	s.timed("roll back", in("replay", "--rollback", "shipments"))
	s.awaitVersion("shipments", 1)
	s.delivered(s.timed("load "+ordersA+" orders more", s.loadMore(ordersA)), ordersA, true)
	t.Log(s.timed("verify", in("verify")))

	s.timed("stop", s.compose("stop"))
	for line := range strings.Lines(s.must(s.compose("ps", "--all", "--format", "{{.Name}} {{.Service}} {{.ExitCode}}"))) {
		// A JVM that was told to end says so with its exit code.
		if code := strings.Fields(line)[2]; code != "0" && !(strings.Contains(line, " kafka ") && code == "143") {
			t.Errorf("it did not stop by itself in time: %s", line)
		}
	}
}
