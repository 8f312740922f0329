package embedded

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	logDir     = "kafka"       // in the data directory
	brokerFile = "broker.json" // in logDir
	clusterID  = "wharf-embedded"

	// Segments are read whole when the broker starts, all partitions at a time, so small ones keep that small.
	segmentBytes = 4 << 20
	// The largest request that Apache Kafka takes unless it is told otherwise.
	maxRequest = 100 << 20
)

// Broker is a running broker of our own. It is one broker, in this process, that speaks Kafka's protocol to whoever
// connects. It needs no memory for records, only about 100 bytes for each batch of them.
//
// What it acknowledges has been given to the operating system, so it outlives this process, but not a loss of power.
// Topics, their settings, committed offsets with their metadata and what makes a producer idempotent outlive it too.
// Topics are never created by themselves. Transactions work, but only an orderly end keeps them; Wharf uses none.
type Broker struct {
	dir     string
	state   brokerState
	cluster *kfake.Cluster
	addrs   []string
	close   sync.Once
	failed  error
}

// brokerState is what the data directory remembers of its broker.
type brokerState struct {
	Port    int  `json:"port"`    // taken again if it is free, so that clients of an earlier run find the broker
	InOrder bool `json:"inOrder"` // the last run has ended in order
}

// StartBroker starts a broker on the log in dir, which it makes on first use, and returns when clients can connect. It
// listens on 127.0.0.1. ctx bounds the start alone. The caller holds the Lock of dir.
func StartBroker(ctx context.Context, dir string, log *slog.Logger) (*Broker, error) {
	b := &Broker{dir: filepath.Join(dir, logDir)}
	if err := b.start(ctx, log); err != nil {
		return nil, fmt.Errorf("start the embedded broker in %s: %w", b.dir, err)
	}
	return b, nil
}

func (b *Broker) start(ctx context.Context, log *slog.Logger) error {
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return err
	}
	err := readJSON(b.stateFile(), &b.state)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err == nil && !b.state.InOrder {
		if err := recoverLog(ctx, b.dir, log); err != nil {
			return fmt.Errorf("recover the log: %w", err)
		}
	}
	// The members of consumer groups went with the process. Remembering them would let their successors wait until
	// their sessions time out.
	if err := removeIfThere(filepath.Join(b.dir, "session_state.json")); err != nil {
		return err
	}
	b.state.InOrder = false
	if err := writeJSON(b.stateFile(), b.state); err != nil {
		return err
	}

	cluster, err := kfake.NewCluster(
		kfake.NumBrokers(1),
		kfake.ClusterID(clusterID),
		kfake.DataDir(b.dir),
		kfake.ListenFn(b.listen),
		kfake.WithLogger(kfakeLog{log}),
		kfake.BrokerConfigs(map[string]string{
			"log.segment.bytes": strconv.Itoa(segmentBytes),
			// A policy's committed offset is its progress: it must not be forgotten while the demo rests.
			"offsets.retention.minutes": "2147483647",
		}),
	)
	if err != nil {
		return err
	}
	b.cluster, b.addrs = cluster, cluster.ListenAddrs()
	if err := writeJSON(b.stateFile(), b.state); err != nil { // the port is known now
		cluster.Close()
		return err
	}
	return nil
}

// Addrs are the addresses for clients to start from, host:port.
func (b *Broker) Addrs() []string { return b.addrs }

// Close ends the broker in order. Clients should be gone by then; those that are not lose their connection. It may be
// called more than once.
func (b *Broker) Close() error {
	b.close.Do(func() {
		b.cluster.Close()
		b.state.InOrder = true
		if err := writeJSON(b.stateFile(), b.state); err != nil {
			b.failed = fmt.Errorf("close the embedded broker: %w", err)
		}
	})
	return b.failed
}

func (b *Broker) stateFile() string { return filepath.Join(b.dir, brokerFile) }

// listen takes the port of the last run, or any other if somebody else has it now.
func (b *Broker) listen(network, _ string) (net.Listener, error) {
	l, err := net.Listen(network, net.JoinHostPort("127.0.0.1", strconv.Itoa(b.state.Port)))
	if err != nil {
		l, err = net.Listen(network, "127.0.0.1:0")
	}
	if err != nil {
		return nil, err
	}
	b.state.Port = l.Addr().(*net.TCPAddr).Port
	return listener{l}, nil
}

// listener turns away connections that do not speak Kafka's protocol, such as a browser's: kfake would take their
// first bytes for the length of a request.
type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{Conn: c}, nil
}

type conn struct {
	net.Conn
	first io.Reader // the connection from its first byte on, once that has been looked at
}

var errNotKafka = errors.New("the client does not speak Kafka's protocol")

func (c *conn) Read(p []byte) (int, error) {
	if c.first == nil {
		start := make([]byte, 8) // length, which request, version
		if _, err := io.ReadFull(c.Conn, start); err != nil {
			return 0, err
		}
		request := int16(binary.BigEndian.Uint16(start[4:]))
		if binary.BigEndian.Uint32(start) > maxRequest || kmsg.RequestForKey(request) == nil {
			return 0, errNotKafka
		}
		c.first = io.MultiReader(bytes.NewReader(start), c.Conn)
	}
	return c.first.Read(p)
}

// kfakeLog hands kfake's warnings on. It tells everything else far too often.
type kfakeLog struct{ log *slog.Logger }

func (l kfakeLog) Logf(level kfake.LogLevel, format string, args ...any) {
	switch level {
	case kfake.LogLevelError:
		l.log.Error(fmt.Sprintf("broker: "+format, args...))
	case kfake.LogLevelWarn:
		l.log.Warn(fmt.Sprintf("broker: "+format, args...))
	}
}
