// Package intercept is what gates, agents and sessions say to each other about
// connections from the cluster to a developer's machine: the first bytes of such
// a connection, and what a gate knows (State). It holds types and their encoding
// only.
//
// The way of a connection:
//
//	client ── Service ── gate ══ agent ══ session ── local program
//	                       └──── origin, when the machine does not answer
//
// The gate dials the agent's pod (Port), the agent dials the session through the
// tunnel (Port again, at its inbound address). Each of them passes the Header on
// and the Status back. After Accepted come the connection's own bytes, or framed
// datagrams, both ways; after any other Status the connection ends. So a gate
// knows before the first byte of the client whether the machine serves it.
package intercept

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// Port is the TCP port at which an agent takes connections of gates, on its
// pod's addresses, and a session those of its agent, at its inbound addresses.
const Port = 7535

// Networks of a Header.
const (
	TCP = "tcp"
	UDP = "udp" // datagrams, framed
	// Watch is no connection: a Status every BeatEvery. One that is not given, since
	// the ID and Token do not fit or cannot be checked, gets one Status and ends.
	Watch = "watch"
)

// BeatEvery is how often a watch says how it is; a watch that is silent for
// SilentAfter is as good as Away. Together with a dial they stay below the 3 s in
// which traffic has to find the origin.
const (
	BeatEvery   = 500 * time.Millisecond
	SilentAfter = 1500 * time.Millisecond
)

// LostAfter is how long a connection that is open waits for a machine that went
// away; then it is reset.
const LostAfter = 30 * time.Second

// Header introduces a connection.
type Header struct {
	Network string `json:"net"`
	// ID names the intercept, and Token proves that the gate was told of it by
	// its owner. A gate's watch has those of any intercept that it leads to the
	// agent; the agent has the session check them. The agent's own watch of the
	// session has neither.
	ID    string `json:"id,omitempty"`
	Token string `json:"token,omitempty"`
	// Client is who connects, and Server what he connected to, as far as known.
	Client netip.AddrPort `json:"client,omitzero"`
	Server netip.AddrPort `json:"server,omitzero"`
}

// maxHeader bounds an encoded Header, in bytes.
const maxHeader = 1 << 10

// WriteHeader sends h, with one write.
func WriteHeader(w io.Writer, h Header) error {
	b, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("encoding a header: %w", err)
	}
	if len(b) > maxHeader {
		return fmt.Errorf("a header of %d bytes, where %d are possible", len(b), maxHeader)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}

// ReadHeader reads what WriteHeader sent, and not a byte more.
func ReadHeader(r io.Reader) (h Header, err error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return h, err
	}
	n := binary.BigEndian.Uint16(size[:])
	if n > maxHeader {
		return h, fmt.Errorf("a header of %d bytes, where %d are possible", n, maxHeader)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return h, err
	}
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("reading a header: %w", err)
	}
	return h, nil
}

// Status is the answer to a Header, one byte.
type Status byte

// What a Status may be.
const (
	Accepted Status = 1 // the local program took the connection; on a watch: the machine is here
	Refused  Status = 2 // nothing listens at the local port
	Away     Status = 3 // the machine does not answer
	Unknown  Status = 4 // there is no such intercept, or the token is wrong
	Leaving  Status = 5 // the agent is about to end: what is open shall end soon
)

var statusNames = map[Status]string{Accepted: "accepted", Refused: "refused", Away: "away", Unknown: "unknown", Leaving: "leaving"}

func (s Status) String() string {
	if name := statusNames[s]; name != "" {
		return name
	}
	return fmt.Sprintf("status %d", byte(s))
}

// WriteStatus sends s.
func WriteStatus(w io.Writer, s Status) error {
	_, err := w.Write([]byte{byte(s)})
	return err
}

// ReadStatus reads one byte.
func ReadStatus(r io.Reader) (Status, error) {
	var b [1]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, err
	}
	if statusNames[Status(b[0])] == "" {
		return 0, fmt.Errorf("unknown status %d", b[0])
	}
	return Status(b[0]), nil
}

// MaxDatagram is the longest payload of UDP.
const MaxDatagram = 65507

// WriteDatagram sends p with its length before it, in one write; buf is scratch
// space of at least 2+len(p) bytes, or nil.
func WriteDatagram(w io.Writer, p, buf []byte) error {
	if len(p) > MaxDatagram {
		return fmt.Errorf("a datagram of %d bytes, where %d are possible", len(p), MaxDatagram)
	}
	buf = binary.BigEndian.AppendUint16(buf[:0], uint16(len(p)))
	_, err := w.Write(append(buf, p...))
	return err
}

// DatagramSize reads how many bytes of a datagram follow: for who does not want to
// hold a buffer until it comes.
func DatagramSize(r io.Reader) (int, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > MaxDatagram {
		return 0, fmt.Errorf("a datagram of %d bytes, where %d are possible", n, MaxDatagram)
	}
	return n, nil
}

// ReadDatagram reads one datagram into buf and returns its length.
func ReadDatagram(r io.Reader, buf []byte) (int, error) {
	n, err := DatagramSize(r)
	if err != nil {
		return 0, err
	}
	if n > len(buf) {
		return 0, errors.New("a datagram is longer than the buffer")
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return 0, err
	}
	return n, nil
}
