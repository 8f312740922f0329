// Package apache answers the question "how do the tests get a real Apache Kafka without containers?": brokers as
// processes of this machine, which can be killed, paused and started again.
//
// Read this file first: a cluster, its brokers and what may be done to them. maven.go is where the program comes from.
package apache

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/IBM/sarama"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
)

const (
	startTimeout = 2 * time.Minute
	stopTimeout  = 10 * time.Second

	// Not from the range that the system gives to outgoing connections: one of them could hold the port of a broker
	// that is to start again.
	firstPort = 20000
	lastPort  = 32000
)

// Cluster is one or more brokers of our own, each of them a controller too. Topics are never created by themselves. A
// topic's min.insync.replicas is 2 unless it says otherwise, or 1 in a cluster of one broker.
type Cluster struct {
	dir     string
	java    string
	lib     string // the directory of the jars
	id      string
	options []string // of Java
	brokers []*Broker
}

// Broker is one process, now and then. Its methods may be called from any goroutine.
type Broker struct {
	Addr string // where clients connect, host:port; the same after every start

	c          *Cluster
	id         int
	listens    string // Addr, but where a proxy stands before the broker
	controller string

	mu     sync.Mutex
	server *exec.Cmd
	exited chan struct{} // closed when the server is gone
}

// Option changes what Start does.
type Option func(*options)

type options struct {
	advertise func(listens string) (string, error)
}

// Advertise lets a proxy stand before every broker: it is called with the address at which a broker will listen, and
// gives the one that clients, and the other brokers, are told.
func Advertise(f func(listens string) (string, error)) Option {
	return func(o *options) { o.advertise = f }
}

// Start starts that many brokers with their data and logs in dir, which has to be empty or missing, and returns when
// clients can use them all. They listen on 127.0.0.1, on free ports. The first time that a user starts one, the
// program is downloaded. Without Java or Maven the error is ErrMissing (see errors.Is).
//
// ctx bounds the start alone. The brokers are stopped by Stop; on Linux they also end when this process does.
func Start(ctx context.Context, dir string, brokers int, opts ...Option) (*Cluster, error) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	c, err := start(ctx, dir, brokers, o)
	if err != nil {
		return nil, fmt.Errorf("start Apache Kafka in %s: %w", dir, err)
	}
	return c, nil
}

func start(ctx context.Context, dir string, brokers int, o options) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, id: clusterID(), options: []string{"-Xmx512m"}}
	if brokers > 1 { // they share the machine, and so each has to start and to live on less
		c.options = []string{"-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"}
	}
	if c.java, err = java(ctx); err != nil {
		return nil, err
	}
	if c.lib, err = jars(ctx); err != nil {
		return nil, err
	}
	addrs, err := freeAddrs(2 * brokers)
	if err != nil {
		return nil, err
	}
	for i := range brokers {
		b := &Broker{c: c, id: i + 1, listens: addrs[2*i], controller: addrs[2*i+1]}
		b.Addr = b.listens
		if o.advertise != nil {
			if b.Addr, err = o.advertise(b.listens); err != nil {
				return nil, fmt.Errorf("advertise %s: %w", b.listens, err)
			}
		}
		c.brokers = append(c.brokers, b)
	}
	each, eachCtx := errgroup.WithContext(ctx)
	for _, b := range c.brokers {
		each.Go(func() error {
			if err := b.format(eachCtx); err != nil {
				return err
			}
			return b.Start(eachCtx)
		})
	}
	if err := each.Wait(); err != nil {
		c.Stop()
		return nil, err
	}
	return c, nil
}

// clusterID is one that cannot be taken for a flag, as Kafka's own are chosen.
func clusterID() string {
	for {
		id := uuid.New()
		if text := base64.RawURLEncoding.EncodeToString(id[:]); text[0] != '-' {
			return text
		}
	}
}

// Addrs are the addresses for clients to start from, host:port, one a broker.
func (c *Cluster) Addrs() []string {
	addrs := make([]string, len(c.brokers))
	for i, b := range c.brokers {
		addrs[i] = b.Addr
	}
	return addrs
}

// Brokers are all brokers, those that do not run included.
func (c *Cluster) Brokers() []*Broker { return c.brokers }

// Stop ends all brokers; see Broker.Stop. It may be called more than once.
func (c *Cluster) Stop() {
	var all sync.WaitGroup
	for _, b := range c.brokers {
		all.Go(b.Stop)
	}
	all.Wait()
}

// Start starts the broker on the data it has, and returns when it is a part of the cluster that clients can use. A
// broker that runs is left alone.
func (b *Broker) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not ready after %v", startTimeout))
	defer cancel()
	exited, err := b.run()
	if err == nil {
		err = b.ready(ctx, exited)
	}
	if err != nil {
		return fmt.Errorf("broker %d: %w: %s", b.id, err, b.said())
	}
	return nil
}

func (b *Broker) run() (exited chan struct{}, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.server != nil {
		select {
		case <-b.exited:
		default:
			return b.exited, nil
		}
	}
	output, err := os.OpenFile(b.file("log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	cmd := exec.Command(b.c.java, append(slices.Clone(b.c.options), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
		"-Dorg.slf4j.simpleLogger.showDateTime=true", "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
		"-cp", filepath.Join(b.c.lib, "*"), "kafka.Kafka", b.file("properties"))...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = attributes()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	b.server, b.exited = cmd, make(chan struct{})
	go func(exited chan struct{}) {
		_ = cmd.Wait()
		close(exited)
	}(b.exited)
	return b.exited, nil
}

// ready waits until the broker counts itself among those of the cluster.
func (b *Broker) ready(ctx context.Context, exited <-chan struct{}) error {
	for {
		err := b.serves()
		if err == nil {
			return nil
		}
		select {
		case <-exited:
			return errors.New("it ended at once")
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (b *Broker) serves() error {
	conf := sarama.NewConfig()
	conf.Version = sarama.V3_6_0_0
	conf.Net.DialTimeout, conf.Net.ReadTimeout = time.Second, 5*time.Second
	conn := sarama.NewBroker(b.listens)
	if err := conn.Open(conf); err != nil {
		return err
	}
	defer conn.Close()
	resp, err := conn.GetMetadata(sarama.NewMetadataRequest(conf.Version, []string{}))
	if err != nil {
		return err
	}
	for _, known := range resp.Brokers {
		if known.ID() == int32(b.id) {
			return nil
		}
	}
	return errors.New("it has not joined its cluster")
}

// Kill ends the broker at once, with SIGKILL, and returns when it is gone.
func (b *Broker) Kill() {
	if exited := b.signal(syscall.SIGKILL); exited != nil {
		<-exited
	}
}

// Pause stops the broker where it is, with SIGSTOP; its connections stay open, and nothing is answered until Resume.
func (b *Broker) Pause() { b.signal(syscall.SIGSTOP) }

// Resume lets a paused broker go on.
func (b *Broker) Resume() { b.signal(syscall.SIGCONT) }

// Stop ends the broker in order, with SIGTERM, and by force when that takes too long. It may be called more than once.
func (b *Broker) Stop() {
	exited := b.signal(syscall.SIGTERM)
	if exited == nil {
		return
	}
	b.signal(syscall.SIGCONT) // in case it is paused
	select {
	case <-exited:
	case <-time.After(stopTimeout):
		b.Kill()
	}
}

// signal sends the signal to the broker. The result is nil when it does not run.
func (b *Broker) signal(s syscall.Signal) (exited <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.server == nil || b.server.Process.Signal(s) != nil {
		return nil
	}
	return b.exited
}

// format writes the broker's settings and makes its data directory.
func (b *Broker) format(ctx context.Context) error {
	if err := os.WriteFile(b.file("properties"), []byte(b.properties()), 0o644); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, b.c.java, "-cp", filepath.Join(b.c.lib, "*"), "kafka.tools.StorageTool", "format",
		"--cluster-id", b.c.id, "--config", b.file("properties"))
	cmd.SysProcAttr = attributes()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("format the data directory of broker %d: %w: %s", b.id, err, tail(out))
	}
	return nil
}

func (b *Broker) properties() string {
	replicas, inSync := 1, 1
	if n := len(b.c.brokers); n >= 3 {
		replicas, inSync = 3, 2
	}
	voters := make([]string, len(b.c.brokers))
	for i, other := range b.c.brokers {
		voters[i] = fmt.Sprintf("%d@%s", other.id, other.controller)
	}
	var w strings.Builder
	for _, p := range [][2]any{
		{"process.roles", "broker,controller"},
		{"node.id", b.id},
		{"controller.quorum.voters", strings.Join(voters, ",")},
		{"controller.listener.names", "CONTROLLER"},
		{"listeners", "PLAINTEXT://" + b.listens + ",CONTROLLER://" + b.controller},
		{"advertised.listeners", "PLAINTEXT://" + b.Addr},
		{"log.dirs", b.file("data")},

		{"auto.create.topics.enable", false},
		{"unclean.leader.election.enable", false},
		{"min.insync.replicas", inSync},
		{"default.replication.factor", replicas},
		{"offsets.topic.replication.factor", replicas},
		{"transaction.state.log.replication.factor", replicas},
		{"transaction.state.log.min.isr", inSync},

		// A broker that was killed may come back only when its old session has timed out.
		{"broker.session.timeout.ms", 3000},
		{"broker.heartbeat.interval.ms", 500},
		{"group.initial.rebalance.delay.ms", 0},
		// Fewer than usual: a cluster of our own is small and starts often.
		{"offsets.topic.num.partitions", 8},
		{"transaction.state.log.num.partitions", 4},
	} {
		fmt.Fprintf(&w, "%s=%v\n", p[0], p[1])
	}
	return w.String()
}

// file is a file or directory of the broker's.
func (b *Broker) file(kind string) string {
	return filepath.Join(b.c.dir, fmt.Sprintf("broker-%d.%s", b.id, kind))
}

// said is the end of the broker's log.
func (b *Broker) said() []byte {
	log, _ := os.ReadFile(b.file("log"))
	return tail(log)
}

func tail(log []byte) []byte { return bytes.TrimSpace(log[max(0, len(log)-3000):]) }

// freeAddrs are addresses that nobody listens at, at the moment.
func freeAddrs(n int) (addrs []string, err error) {
	for tries := 0; len(addrs) < n; tries++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", firstPort+rand.N(lastPort-firstPort)))
		if err != nil {
			if tries > 100 {
				return nil, fmt.Errorf("find a free port: %w", err)
			}
			continue
		}
		defer l.Close() // all are held until there are enough
		addrs = append(addrs, l.Addr().String())
	}
	return addrs, nil
}
