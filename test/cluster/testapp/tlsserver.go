package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"time"
)

// serveTLS serves HTTPS, HTTP/1.1 and HTTP/2, with the certificate that it was given, or
// one that names the server and that nobody signed.
func (a *app) serveTLS(addr string) error {
	certificate, err := a.certificate()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s := &http.Server{Handler: a.handler(), TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate}}}
	return s.ServeTLS(l, "", "")
}

func (a *app) certificate() (c tls.Certificate, err error) {
	if dir := a.certificates; dir != "" {
		return tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, fmt.Errorf("make a key: %w", err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: a.name}, DNSNames: []string{a.name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		return c, fmt.Errorf("make a certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// greet speaks first, as MySQL's servers do: a packet of protocol 10 with a version
// that names the server. Then it echoes.
func (a *app) greet(c net.Conn) {
	hello := append([]byte{10}, a.name...)
	hello = append(hello, 0)
	if _, err := c.Write(append([]byte{byte(len(hello)), byte(len(hello) >> 8), 0, 0}, hello...)); err != nil {
		return
	}
	io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
}
