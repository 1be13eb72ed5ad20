package carrier

import "golang.zx2c4.com/wireguard/conn"

// BindConfig tunes a Bind; the zero value is right.
type BindConfig struct {
	// GateBytes and GatePackets bound what is inside WireGuard, each way.
	GateBytes, GatePackets int
}

// Stats counts what a Bind moved.
type Stats struct {
	Sent, Received, SentPackets, ReceivedPackets, Dropped uint64
	Streams                                               uint64 // attached so far
}

// Bind is WireGuard's conn.Bind over the attached Stream.
type Bind struct{}

// NewBind makes a Bind without a stream.
func NewBind(cfg BindConfig) *Bind { return &Bind{} }

// Attach makes s the stream in use and closes the one before it.
func (b *Bind) Attach(s *Stream) {}

// Stats is a snapshot of the counters.
func (b *Bind) Stats() Stats { return Stats{} }

func (b *Bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) { return nil, 0, nil }
func (b *Bind) Close() error                                         { return nil }
func (b *Bind) SetMark(uint32) error                                 { return nil }
func (b *Bind) Send(bufs [][]byte, ep conn.Endpoint) error           { return nil }
func (b *Bind) ParseEndpoint(s string) (conn.Endpoint, error)        { return nil, nil }
func (b *Bind) BatchSize() int                                       { return conn.IdealBatchSize }
