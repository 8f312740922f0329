//go:build compose

// Package compose_test answers the question "does the shop in containers survive the loss of any of them?". It needs
// Docker, and runs with `make compose-test`: it builds the image, starts the project under a name of its own, loads it
// through the proxy, scales it, kills its parts in turn under load, audits it, and takes it down.
package compose_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	project = "wharf-test"
	ordersA = "150" // of the first load
	ordersB = "600" // of the load under which parts are killed
)

// invoices is the file that WHARF_INVOICES names, or the one beside the checkout; without either, orders are made up.
func invoices() []string {
	if file := os.Getenv("WHARF_INVOICES"); file != "" {
		return []string{"--file", file}
	}
	if files, _ := filepath.Glob("../../../shared/data/*.csv.gz"); len(files) > 0 {
		return []string{"--file", files[0]}
	}
	return nil
}

type stack struct {
	t    *testing.T
	port string
	bin  string // wharf, for this machine
}

func (s *stack) compose(args ...string) *exec.Cmd {
	c := exec.CommandContext(context.WithoutCancel(s.t.Context()), "docker", append([]string{"compose", "--project-name", project}, args...)...)
	c.Dir = "../.."
	c.Env = append(os.Environ(), "PROXY_PORT="+s.port)
	return c
}

// must runs a command to its end and says how long that took.
func (s *stack) must(what string, c *exec.Cmd) string {
	s.t.Helper()
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	began := time.Now()
	err := c.Run()
	s.t.Logf("%-40s %6.1f s", what, time.Since(began).Seconds())
	if err != nil {
		s.t.Fatalf("%s: %v\n%s%s", what, err, tail(out.String()), tail(errs.String()))
	}
	return out.String()
}

func tail(s string) string { return s[max(0, len(s)-6000):] }

func (s *stack) wharf(args ...string) *exec.Cmd {
	return exec.CommandContext(s.t.Context(), s.bin, args...)
}

func (s *stack) url() string { return "http://127.0.0.1:" + s.port }

func (s *stack) load(orders string) *exec.Cmd {
	return s.wharf(append([]string{"load", "--url", s.url(), "--orders", orders, "--concurrency", "16", "--json"}, invoices()...)...)
}

func (s *stack) delivered(report, orders string) {
	s.t.Helper()
	var r struct{ Placed, Delivered, Cancelled int }
	if err := json.Unmarshal([]byte(report), &r); err != nil {
		s.t.Fatalf("the report %q: %v", report, err)
	}
	s.t.Log(strings.TrimSpace(report))
	if fmt.Sprint(r.Placed) != orders || r.Delivered+r.Cancelled != r.Placed || r.Cancelled > 0 && invoices() != nil {
		s.t.Errorf("of %s orders %d are delivered", orders, r.Delivered)
	}
}

// kill kills the containers of a service's first replica, waits until it is gone and lets it come back: a container that
// was killed by hand is not started again by its restart policy.
func (s *stack) kill(service string) {
	s.t.Helper()
	id := strings.Fields(s.must("find "+service, s.compose("ps", "--quiet", service)))[0]
	s.must("kill "+service, exec.Command("docker", "kill", id))
	s.must("start "+service+" again", exec.Command("docker", "start", id))
}

func TestTheShopInContainers(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	s := &stack{t: t, port: port, bin: filepath.Join(t.TempDir(), "wharf")}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := s.compose("logs", "--no-color", "--tail", "60").CombinedOutput()
			t.Logf("the containers say:\n%s", logs)
		}
		s.must("take it down", s.compose("down", "--volumes", "--timeout", "5"))
	})
	s.must("build the tool", exec.Command("go", "build", "-o", s.bin, "../../cmd/wharf"))
	s.must("build the image", s.compose("build", "topics"))
	s.must("start", s.compose("up", "--detach", "--wait"))

	report := s.must("load "+ordersA+" orders", s.load(ordersA))
	s.delivered(report, ordersA)
	s.must("scale", s.compose("up", "--detach", "--wait", "--no-recreate", "--scale", "orders=3", "--scale", "projector=3"))

	loading := s.load(ordersB)
	var out bytes.Buffer
	loading.Stdout = &out
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
	// Each part is killed when the load has gone on for a moment since the one before.
	for _, service := range []string{"orders", "projector", "kafka", "postgres", "payments", "inventory"} {
		line, open := <-lines
		for open && !strings.HasPrefix(line, "placed") {
			t.Log(line)
			line, open = <-lines
		}
		if !open {
			t.Logf("the load has ended before %s was killed", service)
			break
		}
		t.Log(line)
		s.kill(service)
	}
	for line := range lines {
		t.Log(line)
	}
	if err := loading.Wait(); err != nil {
		t.Fatalf("the load: %v", err)
	}
	t.Logf("%-40s %6.1f s", "load "+ordersB+" orders under kills", time.Since(began).Seconds())
	s.delivered(out.String(), ordersB)
	s.must("wait until all are healthy", s.compose("up", "--detach", "--wait", "--no-recreate", "--scale", "orders=3", "--scale", "projector=3"))
	s.must("replay", s.compose("exec", "-T", "projector", "wharf", "replay", "--all"))
	t.Log(s.must("audit", s.wharf("audit", "--url", s.url())))
}
